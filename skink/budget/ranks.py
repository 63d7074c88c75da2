"""The choices of rank for one matrix, as a curve of loss against cost."""

import torch
from torch import Tensor

from skink.budget.allocate import Curve
from skink.budget.target import Pricing
from skink.errors import check_range


def rank_curve(
    name: str,
    discarded: Tensor,
    shape: tuple[int, int],
    pricing: Pricing,
    *,
    multiple: int = 1,
    floor: int = 0,
    pivoted: bool = False,
    uses: int = 1,
) -> tuple[Curve, Tensor]:
    """The curve of a matrix, and the rank of each of its choices: int64[K], 0 for the last, which is to stay dense.

    The choices are those multiples that cost less than the dense matrix does.

    Args:
        name: of the layer.
        discarded: float64[min(out, in) + 1]; at r the loss, in nats per token, when rank r is kept; a rank whose loss
            is not finite is not offered.
        shape: (out, in).
        pricing: see `pricing`.
        multiple: ranks are multiples of it, as hardware likes; 1 or more. Where a matrix has no such rank that saves
            anything, it stays dense.
        floor: the least rank to offer; 0 for none. A measured curve needs one, because what one matrix alone loses says
            little about what many lose together.
        pivoted: whether R rows of the product are stored as they are, see `Pricing`.
        uses: how many times each token passes through the weight.

    Raises:
        OptionError: OPTION-002 out of range.
    """
    check_range("multiple_of", multiple, low=1, high=1 << 20)
    check_range("floor", floor, low=0, high=1 << 30)
    if len(discarded) != min(shape) + 1:
        raise ValueError(f"{name}: {len(discarded)} losses for a matrix of {shape}, not {min(shape) + 1}")
    dense = pricing.linear(*shape, uses=uses)
    ranks = torch.arange(1, min(shape) // multiple + 1) * multiple
    ranks = ranks[(ranks >= floor) & torch.isfinite(discarded[ranks]).cpu()]
    costs = pricing.low_rank_curve(*shape, ranks, pivoted=pivoted, uses=uses).cpu()
    saves = costs < dense
    ranks, costs = ranks[saves], costs[saves]
    # A predicted loss is a sum of squares; what rounding leaves below zero must not look like a gain.
    losses = discarded.double().cpu()[ranks].clamp(min=0)
    zero = torch.zeros(1, dtype=torch.float64)
    curve = Curve(name, torch.cat((losses, zero)), torch.cat((costs, zero + dense)))
    return curve, torch.cat((ranks, torch.zeros(1, dtype=torch.int64)))
