"""`skink::rotary`: see reference.py for the meaning and README.md for layout and cost."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from skink.kernels.opdef import Cost, OpCall, OpDef, Tolerance, cpp_variant, nbytes
from skink.kernels.rotary.reference import rotary


def _cost(arguments: Mapping[str, Any]) -> Cost:
    x, cos, sin = arguments["input"], arguments["cos"], arguments["sin"]
    turned = int(x.numel()) // int(x.shape[-1]) * int(cos.shape[-1])
    return Cost(macs=2 * turned, bytes=2 * nbytes(x) + nbytes(cos, sin))


def _cpp_supports(call: OpCall) -> str | None:
    tables = {call.arguments["cos"].dtype, call.arguments["sin"].dtype}
    if not tables <= {call.dtype, torch.float32}:
        return f"needs tables in float32 or in the input's dtype, got {sorted(map(str, tables))}"
    return None


def _fake(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


OP = OpDef(
    name="rotary",
    schema="rotary(Tensor input, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor",
    reference=rotary,
    fake=_fake,
    tolerance={
        torch.float64: Tolerance(1e-12, 1e-12),
        torch.float32: Tolerance(1e-6, 1e-5),
        torch.bfloat16: Tolerance(3e-2, 2e-2),
        torch.float16: Tolerance(4e-3, 2e-3),
    },
    cost=_cost,
    variants=(cpp_variant("rotary", _cpp_supports),),
)
