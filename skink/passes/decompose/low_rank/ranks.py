"""Which rank each weight gets out of one budget: the same share for all, or where it does the most good."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from skink.budget import Curve, Pricing, allocate, rank_curve
from skink.passes.decompose.factorize.factorize import uniform_rank
from skink.passes.decompose.low_rank.candidates import Candidate, Stack

# Automatic multiples: a power of two up to this share of the rank that breaks even, since rounding must not cost a
# noticeable part of it; at most a tile of a GPU's matrix product; and below 16 bytes of bfloat16 they gain nothing.
_FINEST = 1 / 32
_TILE = 64
_ALIGNED = 8


@dataclass(frozen=True)
class Ranking:
    """How ranks are counted: options of `LowRank`, see there."""

    prices: Pricing
    pivoted: bool
    multiple_of: int
    floor: float
    keep: float
    fixed: float = 0.0

    def budget(self, stacks: Iterable[Stack]) -> float:
        """What the factors of these stacks may cost, together with the layers that stay dense anyway, at `fixed`."""
        return self.keep * (sum(map(self.dense, stacks)) + self.fixed)

    def multiple(self, stack: Stack) -> int:
        """What ranks of a stack are multiples of."""
        if self.multiple_of:
            return self.multiple_of
        multiple = 1 << max(0, int(_FINEST * uniform_rank(1.0, *stack.shape)).bit_length() - 1)
        return min(_TILE, multiple) if multiple >= _ALIGNED else 1

    def most(self, stack: Stack) -> int:
        """The largest rank that can be of use."""
        return min(stack.shape) - 1 if self.pivoted else uniform_rank(1.0, *stack.shape)

    def dense(self, stack: Stack) -> float:
        """The price of a stack as it is."""
        return sum(self.prices.linear(*layer.shape, uses=stack.uses) for layer in stack.layers)

    def curve(self, stack: Stack, losses: Tensor | None = None) -> tuple[Curve, Tensor]:
        """What each rank of a stack costs and loses, and the ranks; the last is 0 and means dense."""
        reachable = torch.full((min(stack.shape) + 1,), math.inf, dtype=torch.float64)
        known = torch.zeros(self.most(stack) + 1, dtype=torch.float64) if losses is None else losses
        reachable[: len(known)] = known
        floor = self.floor * self.keep * uniform_rank(1.0, *stack.shape)
        return rank_curve(
            stack.name,
            reachable,
            stack.shape,
            self.prices,
            multiple=self.multiple(stack),
            floor=math.ceil(floor - 1e-9),
            pivoted=self.pivoted,
            uses=stack.uses,
        )


def uniform_ranks(stacks: Sequence[Stack], ranking: Ranking) -> dict[Stack, int]:
    """Of every stack the largest rank within the same share of its price, at most `keep`; 0: it stays dense.

    The share is less than `keep` where stacks stay dense because no rank of theirs saves anything.

    Raises:
        BudgetError: BUDGET-001 where the least ranks cost more than `keep`.
    """
    choices = {stack: ranking.curve(stack) for stack in stacks}
    budget = ranking.budget(stacks)
    room = budget - ranking.fixed

    def at(share: float) -> dict[Stack, int]:
        ranks = {}
        for stack, (curve, offered) in choices.items():
            fitting = (curve.costs[:-1] <= share * curve.costs[-1] * (1 + 1e-12)).nonzero()
            # The least rank where none fits: dense would cost more still.
            ranks[stack] = int(offered[int(fitting[-1]) if len(fitting) else 0]) if share < 1 else 0
        return ranks

    def cost(ranks: Mapping[Stack, int]) -> float:
        return sum(
            float(curve.costs[int((offered == ranks[stack]).nonzero()[0])])
            for stack, (curve, offered) in choices.items()
        )

    if cost(at(ranking.keep)) <= room * (1 + 1e-12):
        return at(ranking.keep)
    low, high = 0.0, ranking.keep
    if cost(at(low)) > room:
        # The error is told by the one who tells it for all passes.
        allocate([curve for curve, _ in choices.values()], budget, fixed=ranking.fixed)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= room else (low, middle)
    return at(low)


@dataclass(frozen=True)
class Group:
    """Layers of which each may be factored by itself, or, where there is such a candidate, all as one."""

    single: tuple[Candidate, ...]
    joint: Candidate | None = None


def best_ranks(groups: Sequence[Group], ranking: Ranking) -> list[tuple[Candidate, int]]:
    """Candidates and ranks of the least total loss within the budget, rank 0 for those that stay dense.

    Raises:
        BudgetError: BUDGET-001 where the least ranks cost more than the budget.
    """
    curves, plans = [], []
    for group in groups:
        curve, ranks = _separate(group.single, ranking)
        options = [list(zip(group.single, row, strict=True)) for row in ranks]
        if group.joint is not None:
            joint, offered = ranking.curve(group.joint.stack, group.joint.losses)
            # Its last choice, to stay dense, is among the separate ones.
            curve = Curve(
                curve.name,
                torch.cat((curve.losses, joint.losses[:-1])),
                torch.cat((curve.costs, joint.costs[:-1])),
            )
            options += [[(group.joint, rank)] for rank in offered[:-1].tolist()]
        curves.append(curve)
        plans.append(options)
    budget = ranking.budget(entry.stack for group in groups for entry in group.single)
    chosen = allocate(curves, budget, fixed=ranking.fixed)
    return [pair for options, index in zip(plans, chosen, strict=True) for pair in options[index]]


def _separate(candidates: Sequence[Candidate], ranking: Ranking) -> tuple[Curve, list[list[int]]]:
    """The curve of several candidates side by side, and their ranks at each of its choices.

    Of two hulls the sum is traced by their segments in the order of steepness; nothing off it can be of use.
    """
    found = [ranking.curve(entry.stack, entry.losses) for entry in candidates]
    name = " + ".join(entry.stack.name for entry in candidates)
    if len(found) == 1:
        curve, offered = found[0]
        return Curve(name, curve.losses, curve.costs), [[rank] for rank in offered.tolist()]
    hulls = [_hull(curve) for curve, _ in found]
    steps = []
    for row, (hull, (curve, _)) in enumerate(zip(hulls, found, strict=True)):
        for one, two in pairwise(hull):
            saved = float(curve.losses[one] - curve.losses[two])
            steps.append((-saved / float(curve.costs[two] - curve.costs[one]), row, one, two))
    at = [hull[0] for hull in hulls]
    plans = [list(at)]
    for _, row, one, two in sorted(steps):
        # What lies between is no vertex, but may be all that a rest of the budget pays for.
        curve = found[row][0]
        between = (
            (curve.costs > curve.costs[one]) & (curve.costs < curve.costs[two]) & (curve.losses < curve.losses[one])
        )
        for choice in [*between.nonzero().flatten().tolist(), two]:
            at[row] = choice
            plans.append(list(at))
    losses = [
        math.fsum(float(curve.losses[index]) for (curve, _), index in zip(found, plan, strict=True)) for plan in plans
    ]
    costs = [
        math.fsum(float(curve.costs[index]) for (curve, _), index in zip(found, plan, strict=True)) for plan in plans
    ]
    ranks = [[int(offered[index]) for (_, offered), index in zip(found, plan, strict=True)] for plan in plans]
    return Curve(name, torch.tensor(losses, dtype=torch.float64), torch.tensor(costs, dtype=torch.float64)), ranks


def _hull(curve: Curve) -> list[int]:
    """The choices on the lower convex hull of (cost, loss), cheapest first, each losing less than the one before."""
    costs, losses = curve.costs.tolist(), curve.losses.tolist()
    hull: list[int] = []
    for index in sorted(range(len(costs)), key=lambda entry: (costs[entry], losses[entry])):
        if not math.isfinite(losses[index]) or (hull and losses[index] >= losses[hull[-1]]):
            continue
        while len(hull) > 1 and (losses[hull[-2]] - losses[hull[-1]]) * (costs[index] - costs[hull[-1]]) <= (
            losses[hull[-1]] - losses[index]
        ) * (costs[hull[-1]] - costs[hull[-2]]):
            hull.pop()
        hull.append(index)
    return hull
