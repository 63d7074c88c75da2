"""`skink::low_rank_linear`: see reference.py for the meaning and README.md for layout and cost."""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from skink.kernels.low_rank_linear.reference import low_rank_linear
from skink.kernels.opdef import Cost, OpCall, OpDef, Tolerance, Variant, cpp_variant, nbytes

_HALVES_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def _cost(arguments: Mapping[str, Any]) -> Cost:
    input, down, up = arguments["input"], arguments["down"], arguments["up"]
    rank, width = (int(size) for size in down.shape)
    outputs = int(up.shape[0])
    output = nbytes(input) // max(1, width) * outputs
    return Cost(
        macs=int(input.numel()) // max(1, width) * rank * (width + outputs),
        bytes=nbytes(input, down, up, arguments["bias"]) + output,
    )


def _one_dtype(call: OpCall) -> str | None:
    for name in ("down", "up", "bias"):
        tensor = call.arguments[name]
        if tensor is not None and tensor.dtype != call.dtype:
            return f"needs {name} in the input's dtype, got {tensor.dtype}"
    return None


def _load_cpu() -> Callable[..., Tensor]:
    from skink.kernels.low_rank_linear.cpu import low_rank_linear as implementation

    return implementation


def _load_triton() -> Callable[..., Tensor]:
    from skink.kernels.low_rank_linear.triton_kernel import low_rank_linear as implementation

    return implementation


def _triton_supports(call: OpCall) -> str | None:
    if call.device.type != "cuda":
        return f"runs on cuda, not on {call.device.type}"
    if call.dtype not in _HALVES_AND_SINGLE:
        return f"reads float32, bfloat16 and float16, not {str(call.dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return _one_dtype(call)


def _fake(input: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    return input.new_empty((*input.shape[:-1], up.shape[0]))


OP = OpDef(
    name="low_rank_linear",
    schema="low_rank_linear(Tensor input, Tensor down, Tensor up, Tensor? bias=None) -> Tensor",
    reference=low_rank_linear,
    fake=_fake,
    tolerance={
        torch.float64: Tolerance(1e-12, 1e-12),
        torch.float32: Tolerance(5e-6, 1e-5),
        torch.bfloat16: Tolerance(2e-2, 2e-2),
        torch.float16: Tolerance(3e-3, 4e-3),
    },
    cost=_cost,
    variants=(
        cpp_variant("low_rank_linear", _one_dtype, _load_cpu),
        Variant("triton", _load_triton, _triton_supports),
    ),
)
