"""`skink::pivoted_linear` in ONNX: two `MatMul`s with their `Add`s, a `Concat`, and a `Gather` for the order.

Graphs that are exported hold two linear layers instead, since the op is made when a program is lowered. This is for a
graph that holds the op all the same.
"""

from typing import Any

import onnxscript

op: Any = onnxscript.opset23  # annotated for scripts; what a lowering handles is values of a graph being built


def pivoted_linear(
    input: Any, kept: Any, rest: Any, kept_bias: Any = None, rest_bias: Any = None, order: Any = None
) -> Any:
    """As the op."""
    z = op.MatMul(input, op.Transpose(kept, perm=[1, 0]))
    z = z if kept_bias is None else op.Add(z, kept_bias)
    others = op.MatMul(z, op.Transpose(rest, perm=[1, 0]))
    others = others if rest_bias is None else op.Add(others, rest_bias)
    both = op.Concat(z, others, axis=-1)
    return both if order is None else op.Gather(both, order, axis=-1)
