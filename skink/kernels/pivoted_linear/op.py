"""`skink::pivoted_linear`: see reference.py for the meaning and README.md for layout and cost."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from skink.kernels.opdef import Cost, OpCall, OpDef, Tolerance, cpp_variant, nbytes
from skink.kernels.pivoted_linear.reference import pivoted_linear


def _cost(arguments: Mapping[str, Any]) -> Cost:
    input, kept, rest = arguments["input"], arguments["kept"], arguments["rest"]
    rank, width = (int(size) for size in kept.shape)
    others, order = int(rest.shape[0]), arguments["order"]
    rows = int(input.numel()) // max(1, width)
    outputs = rank + others if order is None else int(order.shape[0])
    stored = nbytes(kept, rest, arguments["kept_bias"], arguments["rest_bias"], order)
    return Cost(
        macs=rows * rank * (width + others), bytes=nbytes(input) + stored + rows * outputs * input.element_size()
    )


def _supports(call: OpCall) -> str | None:
    for name in ("kept", "rest", "kept_bias", "rest_bias"):
        tensor = call.arguments[name]
        if tensor is not None and tensor.dtype != call.dtype:
            return f"needs {name} in the input's dtype, got {tensor.dtype}"
    order = call.arguments["order"]
    return None if order is None or order.dtype == torch.int64 else f"needs order in int64, got {order.dtype}"


def _load_cpu() -> Callable[..., Tensor]:
    from skink.kernels.pivoted_linear.cpu import pivoted_linear as implementation

    return implementation


def _fake(
    input: Tensor,
    kept: Tensor,
    rest: Tensor,
    kept_bias: Tensor | None = None,
    rest_bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    outputs = kept.shape[0] + rest.shape[0] if order is None else order.shape[0]
    return input.new_empty((*input.shape[:-1], outputs))


OP = OpDef(
    name="pivoted_linear",
    schema=(
        "pivoted_linear(Tensor input, Tensor kept, Tensor rest, Tensor? kept_bias=None, Tensor? rest_bias=None, "
        "Tensor? order=None) -> Tensor"
    ),
    reference=pivoted_linear,
    fake=_fake,
    tolerance={
        torch.float64: Tolerance(1e-12, 1e-12),
        torch.float32: Tolerance(5e-6, 1e-5),
        torch.bfloat16: Tolerance(2e-2, 2e-2),
        torch.float16: Tolerance(3e-3, 4e-3),
    },
    cost=_cost,
    variants=(cpp_variant("pivoted_linear", _supports, _load_cpu),),
)
