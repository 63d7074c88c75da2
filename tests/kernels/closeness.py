"""How near a kernel must come to the float64 formula, from the op's own table, and proof that this catches an error."""

import torch
from torch import Tensor

from skink.kernels import OpDef


def assert_close(op: OpDef, found: Tensor, exact: Tensor) -> None:
    """Fails unless every element of `found` is the float64 `exact` within the op's tolerance for its dtype."""
    assert exact.dtype is torch.float64
    assert found.shape == exact.shape
    assert bool(found.isfinite().all())
    allowed = op.tolerance[found.dtype]
    excess = (found.double() - exact).abs() - (allowed.absolute + allowed.relative * exact.abs())
    assert bool((excess <= 0).all()), f"off by {float(excess.max()):.3g} more than allowed"


def perturbed(op: OpDef, found: Tensor) -> Tensor:
    """`found` with its middle element moved by ten times what is allowed, which `assert_close` must catch."""
    moved = found.clone().view(-1)
    allowed = op.tolerance[found.dtype]
    middle = moved.numel() // 2
    moved[middle] += 10 * (allowed.absolute + allowed.relative * moved[middle].abs())
    return moved.view_as(found)
