"""How near a kernel must come to the float64 formula: its result is right but for one rounding to its own dtype."""

import torch
from torch import Tensor

# Half a unit in the last place of the storage type, and what float32 sums lose.
_RELATIVE = {torch.float32: 5e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_ABSOLUTE = {torch.float32: 2e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def assert_right(actual: Tensor, expected: Tensor) -> None:
    """Fails unless every element of `actual` is `expected` (float64) within rounding."""
    assert expected.dtype == torch.float64
    assert actual.shape == expected.shape
    allowed = _ABSOLUTE[actual.dtype] + _RELATIVE[actual.dtype] * 1.01 * expected.abs()
    excess = (actual.double() - expected).abs() - allowed
    assert bool((excess <= 0).all()), f"off by {excess.max().item():.3g} more than allowed"


def perturbed(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """`expected` with its middle element moved by ten times what is allowed."""
    moved = expected.clone()
    index = moved.numel() // 2
    value = moved.view(-1)[index]
    moved.view(-1)[index] = value + 10 * (_ABSOLUTE[dtype] + _RELATIVE[dtype] * value.abs())
    return moved
