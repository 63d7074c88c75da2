"""`skink::rms_norm`: see reference.py for the meaning and README.md for layout and cost."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from skink.kernels.opdef import Cost, OpCall, OpDef, Tolerance, cpp_variant, nbytes
from skink.kernels.rms_norm.reference import rms_norm


def _cost(arguments: Mapping[str, Any]) -> Cost:
    x = arguments["input"]
    return Cost(macs=2 * int(x.numel()), bytes=2 * nbytes(x) + nbytes(arguments["weight"]))


def _cpp_supports(call: OpCall) -> str | None:
    weight = call.arguments["weight"]
    if weight is not None and weight.dtype not in (call.dtype, torch.float32):
        return f"needs a weight in float32 or in the input's dtype, got {weight.dtype}"
    return None


def _fake(input: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


OP = OpDef(
    name="rms_norm",
    schema="rms_norm(Tensor input, Tensor? weight, float eps, float offset=0.0) -> Tensor",
    reference=rms_norm,
    fake=_fake,
    tolerance={
        torch.float64: Tolerance(1e-12, 1e-12),
        torch.float32: Tolerance(1e-6, 1e-5),
        torch.bfloat16: Tolerance(1e-2, 1e-2),
        torch.float16: Tolerance(1e-3, 2e-3),
    },
    cost=_cost,
    variants=(cpp_variant("rms_norm", _cpp_supports),),
)
