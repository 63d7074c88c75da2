"""Values between a few that are known."""

from collections.abc import Sequence

import torch
from torch import Tensor


def interpolate(at: Tensor, known: Sequence[int], values: Sequence[float]) -> Tensor:
    """The piecewise linear function through (known, values), float64; its end pieces go on, and never below 0.

    Args:
        at: where, any shape.
        known: ascending, one or more; of one alone the function is constant.
        values: at those, 0 or more.
    """
    x, y = torch.tensor(known, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    if len(x) == 1:
        return y.expand(at.shape).clone()
    left = (torch.searchsorted(x, at.double(), right=True) - 1).clamp(0, len(x) - 2)
    slope = (y[left + 1] - y[left]) / (x[left + 1] - x[left])
    return (y[left] + slope * (at - x[left])).clamp(min=0)
