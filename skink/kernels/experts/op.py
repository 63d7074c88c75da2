"""`skink::experts`: see reference.py for the meaning and README.md for layout and cost."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from skink.kernels.experts.reference import experts
from skink.kernels.opdef import Cost, OpCall, OpDef, Tolerance, Variant, nbytes


def _cost(arguments: Mapping[str, Any]) -> Cost:
    tokens, chosen, up, down = (arguments[name] for name in ("tokens", "chosen", "up", "down"))
    pairs, number = int(chosen.numel()), int(up.shape[0])
    # No expert is read twice, and none that nobody chose.
    read = min(pairs, number)
    weights = nbytes(up, down, arguments["up_bias"], arguments["down_bias"]) // number * read
    return Cost(
        macs=pairs * (int(up[0].numel()) + int(down[0].numel())),
        bytes=weights + 2 * nbytes(tokens) + nbytes(chosen, arguments["shares"]),
    )


def _load_torch() -> Callable[..., Tensor]:
    from skink.kernels.experts.torch_impl import experts as implementation

    return implementation


def _torch_supports(call: OpCall) -> str | None:
    return None


def _fake(tokens: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


OP = OpDef(
    name="experts",
    schema=(
        "experts(Tensor tokens, Tensor chosen, Tensor shares, Tensor up, Tensor down, Tensor? up_bias=None, "
        "Tensor? down_bias=None, *, str activation, bool gated=True, bool interleaved=False, bool transposed=False, "
        "float limit=0.0, float alpha=1.0, float shift=0.0) -> Tensor"
    ),
    reference=experts,
    fake=_fake,
    tolerance={
        torch.float64: Tolerance(1e-12, 1e-12),
        torch.float32: Tolerance(2e-6, 1e-5),
        torch.bfloat16: Tolerance(2e-2, 2e-2),
        torch.float16: Tolerance(3e-3, 4e-3),
    },
    cost=_cost,
    variants=(Variant("torch", _load_torch, _torch_supports, differentiable=True),),
)
