"""Sharing one budget out over many weights: one choice each, the least loss in all.

This is the multiple-choice knapsack. For a price p of one unit of cost, every weight on its own takes the choice with
the least loss + p cost, and these choices together lie on the lower convex hull of (total cost, total loss): no set of
choices that costs as little loses less (Everett 1963, theorem 1). The least price whose choices fit into the budget is
found exactly, by chords of that hull. What is left, less than one step of one weight, goes to the best upgrades that
still fit, steepest first.

The loss is at most one step of the hull above the optimum (Sinha and Zoltners 1979), and more budget never loses more:
every upgrade that a smaller budget takes instead is less steep than the one it could not afford.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skink.errors import BudgetError

# Room for the rounding of sums: a budget that is the very sum of what is chosen must hold it.
_ROUNDING = 1e-12
# Chords halve the interval or better; the fill that follows takes the rest of the way, should they not.
_MOST_CHORDS = 100


@dataclass(frozen=True)
class Curve:
    """The choices for one weight, in any order.

    Args:
        name: the weight's or the layer's qualified name.
        losses: float64[K], what each choice adds to the loss, in nats per token, predicted or measured; a choice that
            is not finite is never taken.
        costs: float64[K], what each choice costs, in the unit of the budget; finite.
    """

    name: str
    losses: Tensor
    costs: Tensor

    def __post_init__(self) -> None:
        if self.losses.shape != self.costs.shape or self.losses.dim() != 1:
            raise ValueError(f"{self.name}: losses {tuple(self.losses.shape)} and costs {tuple(self.costs.shape)}")
        if not torch.isfinite(self.losses).any() or not torch.isfinite(self.costs).all():
            raise ValueError(f"{self.name}: no choice has a finite loss, or some cost is not finite")


def allocate(curves: Sequence[Curve], budget: float, *, fixed: float = 0.0) -> tuple[int, ...]:
    """The index of the choice for each curve: their costs fit into `budget`, and their losses are the least.

    Args:
        curves: see `Curve`.
        budget: what all choices may cost, together with `fixed`.
        fixed: what that costs which counts and has no choice.

    Raises:
        BudgetError: BUDGET-001 where even the cheapest choices cost more.
    """
    if not curves:
        return ()
    costs, losses, order = _table(curves)
    room = budget - fixed + abs(budget) * _ROUNDING
    cheapest = torch.zeros(len(curves), dtype=torch.int64)
    best = losses.argmin(dim=1)
    if not _total(costs, cheapest) <= room:
        raise _infeasible(budget, fixed + _total(costs, cheapest), fixed + _whole(costs, losses))
    if _total(costs, best) <= room:
        return _indices(order, best)
    chosen = _fill(costs, losses, _threshold(costs, losses, cheapest, best, room), room)
    return _indices(order, chosen)


def _table(curves: Sequence[Curve]) -> tuple[Tensor, Tensor, Tensor]:
    """Costs, losses and indices of all choices, [N, K], cheapest first and then least loss; unused places lose inf."""
    longest = max(len(curve.costs) for curve in curves)
    costs = torch.zeros(len(curves), longest, dtype=torch.float64)
    losses = torch.full_like(costs, math.inf)
    order = torch.zeros(len(curves), longest, dtype=torch.int64)
    for row, curve in enumerate(curves):
        usable = torch.isfinite(curve.losses).nonzero().flatten().cpu()
        cost, loss = curve.costs.double().cpu()[usable], curve.losses.double().cpu()[usable]
        by_loss = loss.argsort(stable=True)
        place = by_loss[cost[by_loss].argsort(stable=True)]
        costs[row, : len(place)], losses[row, : len(place)] = cost[place], loss[place]
        order[row, : len(place)] = usable[place]
    return costs, losses, order


def _indices(order: Tensor, chosen: Tensor) -> tuple[int, ...]:
    return tuple(int(index) for index in order.gather(1, chosen[:, None]).flatten())


def _total(values: Tensor, chosen: Tensor) -> float:
    # Exactly rounded, so that it does not hang on the order of the curves.
    return math.fsum(values.gather(1, chosen[:, None]).flatten().tolist())


def _threshold(costs: Tensor, losses: Tensor, within: Tensor, beyond: Tensor, room: float) -> Tensor:
    """The choices at the least price that fit into `room`, between choices `within` it and choices `beyond` it."""
    for _ in range(_MOST_CHORDS):
        saved = _total(losses, within) - _total(losses, beyond)
        price = saved / (_total(costs, beyond) - _total(costs, within))
        if not (price > 0 and math.isfinite(price)):
            break
        # The first of equals is the cheapest.
        chosen = torch.add(losses, costs, alpha=price).argmin(dim=1)
        if _total(costs, chosen) <= room:
            if torch.equal(chosen, within):
                break
            within = chosen
        else:
            if torch.equal(chosen, beyond):
                break
            beyond = chosen
    return within


def _fill(costs: Tensor, losses: Tensor, chosen: Tensor, room: float) -> Tensor:
    """`chosen` with upgrades, the steepest that fits first, until none fits."""
    left = room - _total(costs, chosen)
    chosen = chosen.clone()
    waiting = [entry for row in range(len(costs)) if (entry := _steepest(costs, losses, chosen, row, left))]
    heapq.heapify(waiting)
    while waiting:
        _, row, choice = heapq.heappop(waiting)
        extra = float(costs[row, choice] - costs[row, chosen[row]])
        if extra <= left:
            chosen[row] = choice
            left -= extra
        # What is left only shrinks, so what was found with more of it is no less steep: the order of the rest holds.
        if entry := _steepest(costs, losses, chosen, row, left):
            heapq.heappush(waiting, entry)
    return chosen


def _steepest(costs: Tensor, losses: Tensor, chosen: Tensor, row: int, left: float) -> tuple[float, int, int] | None:
    """(-loss saved for each unit of cost, row, choice) of the best upgrade that `left` pays for, or None."""
    now = int(chosen[row])
    extra = costs[row] - costs[row, now]
    saved = losses[row, now] - losses[row]
    open_ = (saved > 0) & (extra <= left)
    if not open_.any():
        return None
    # An upgrade that costs nothing is infinitely steep.
    steepness = torch.where(open_, saved / extra.clamp(min=0), -math.inf)
    choice = int(steepness.argmax())
    return -float(steepness[choice]), row, choice


def _whole(costs: Tensor, losses: Tensor) -> float:
    """What the choices cost that lose least, the dearest of equals: those that leave everything as it is."""
    return math.fsum(costs.where(losses == losses.min(dim=1, keepdim=True).values, -math.inf).amax(dim=1).tolist())


def _infeasible(budget: float, least: float, whole: float) -> BudgetError:
    # Rounded up, so that asking for the share that is named does it.
    share = math.ceil(least / whole * 1e4) / 1e4 if whole > 0 else 1.0
    return BudgetError(
        "BUDGET-001",
        f"the budget of {budget:.6g} is too small: {least:.6g} is the least, of {whole:.6g} as it is.",
        why="that is the cheapest choice of each weight; what can or may not change counts in full.",
        fix=f"allow a share of {share:g} or more; or lower the floor, or let more layers be changed.",
    )
