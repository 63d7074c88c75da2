"""`skink::low_rank_linear` in ONNX: two `MatMul`s, and an `Add` for the bias.

Graphs that are exported hold two linear layers instead, since the op is made when a program is lowered. This is for a
graph that holds the op all the same.
"""

from typing import Any

import onnxscript

op: Any = onnxscript.opset23  # annotated for scripts; what a lowering handles is values of a graph being built


def low_rank_linear(input: Any, down: Any, up: Any, bias: Any = None) -> Any:
    """As the op."""
    inner = op.MatMul(input, op.Transpose(down, perm=[1, 0]))
    result = op.MatMul(inner, op.Transpose(up, perm=[1, 0]))
    return result if bias is None else op.Add(result, bias)
