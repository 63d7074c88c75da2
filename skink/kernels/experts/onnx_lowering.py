"""`skink::experts` in ONNX: a `Scan` over the experts that any token chose, with two `Gemm`s in its body.

So a prompt reads each used expert once, and one new token reads those of its own choice; the weights of a used expert
are copied out of the stack on the way.
"""

from typing import Any

import onnx_ir as ir
import onnxscript
from onnx_ir.tape import Tape

op: Any = onnxscript.opset23  # annotated for scripts; what a lowering handles is values of a graph being built


def experts(
    tokens: Any,
    chosen: Any,
    shares: Any,
    up: Any,
    down: Any,
    up_bias: Any = None,
    down_bias: Any = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float = 0.0,
    alpha: float = 1.0,
    shift: float = 0.0,
) -> Any:
    """As the op; how many experts there are is known."""
    used, *_ = op.Unique(op.Reshape(chosen, op.Constant(value_ints=[-1])))
    last = op.Constant(value_int=int(up.shape[0]) - 1)
    used = op.Compress(used, op.And(op.GreaterOrEqual(used, op.Constant(value_int=0)), op.LessOrEqual(used, last)))
    wide = op.Cast(tokens, to=ir.DataType.FLOAT)
    shares = op.Cast(shares, to=ir.DataType.FLOAT)
    body = _Body(str(chosen.name))
    total = body.value("total", ir.DataType.FLOAT)
    expert = body.value("expert", ir.DataType.INT64)
    # [2, M]: the tokens that chose this expert, and by which of their choices.
    pairs = body("NonZero", body("Equal", chosen, expert))
    rows = body("Gather", pairs, body.number(0))
    weights = [
        body("Gather", stack, expert, axis=0) if stack is not None else None for stack in (up, up_bias, down, down_bias)
    ]
    hidden = body("Gemm", body("Gather", tokens, rows), *weights[:2], transB=int(not transposed))
    active = _activate(
        body,
        hidden,
        activation=activation,
        gated=gated,
        interleaved=interleaved,
        limit=limit,
        alpha=alpha,
        shift=shift,
    )
    result = body("Gemm", body("CastLike", active, tokens), *weights[2:], transB=int(not transposed))
    share = body("GatherND", shares, body("Transpose", pairs))
    part = body("Mul", body("Cast", result, to=ir.DataType.FLOAT), body("Unsqueeze", share, body.integers(-1)))
    summed = body("ScatterND", total, body("Unsqueeze", rows, body.integers(-1)), part, reduction="add")
    graph = ir.Graph([total, expert], [summed], nodes=body.nodes, name=f"{chosen.name}_experts")
    return op.CastLike(op.Scan(op.Sub(wide, wide), used, body=graph, num_scan_inputs=1), tokens)


class _Body(Tape):
    """The nodes of one expert's turn, which read values of the graph outside."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix
        self._count = 0

    def __call__(self, kind: str, *inputs: Any, **attributes: Any) -> ir.Value:
        output = self.op(kind, inputs, attributes)
        self._count += 1
        output.name = f"{self._prefix}/{kind}_{self._count}"
        return output

    def value(self, name: str, dtype: ir.DataType) -> ir.Value:
        """An input of the body."""
        return ir.Value(name=f"{self._prefix}/{name}", type=ir.TensorType(dtype))

    def integers(self, *values: int) -> ir.Value:
        """A constant."""
        return self("Constant", value=ir.tensor(list(values), dtype=ir.DataType.INT64))

    def number(self, value: float) -> ir.Value:
        """A constant without dims: float32, or int64 for an int."""
        dtype = ir.DataType.INT64 if isinstance(value, int) else ir.DataType.FLOAT
        return self("Constant", value=ir.tensor(value, dtype=dtype))


def _activate(
    body: _Body,
    hidden: Any,
    *,
    activation: str,
    gated: bool,
    interleaved: bool,
    limit: float,
    alpha: float,
    shift: float,
) -> Any:
    """As the reference's, in float32."""
    gate = body("Cast", hidden, to=ir.DataType.FLOAT)
    up = None
    if interleaved:
        pairs = body("Reshape", gate, body.integers(0, -1, 2))
        gate, up = (body("Gather", pairs, body.number(half), axis=2) for half in (0, 1))
    elif gated:
        gate, up = body.op_multi_out("Split", [gate], attributes={"axis": 1, "num_outputs": 2}, num_outputs=2)
        gate.name, up.name = f"{hidden.name}_gate", f"{hidden.name}_up"
    if limit:
        gate = body("Min", gate, body.number(limit))
        up = None if up is None else body("Clip", up, body.number(-limit), body.number(limit))
    match activation:
        case "silu":
            scaled = gate if alpha == 1.0 else body("Mul", gate, body.number(alpha))
            result = body("Mul", gate, body("Sigmoid", scaled))
        case "gelu" | "gelu_tanh":
            result = body("Gelu", gate, approximate="tanh" if activation == "gelu_tanh" else "none")
        case _:
            result = body("Relu", gate)
            if activation == "relu2":
                result = body("Mul", result, result)
    if up is None:
        return result
    return body("Mul", result, body("Add", up, body.number(shift)) if shift else up)
