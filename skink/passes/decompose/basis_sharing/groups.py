"""Which layers share a basis, and what each way of factoring them would cost and lose."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from skink.budget import Curve, Pricing, rank_curve
from skink.passes.decompose.selection import LinearLayer
from skink.passes.decompose.tucker.space import block_of

# Prices of cost at which the layers of a group choose their ranks, each for itself.
_PRICES = 256


@dataclass(frozen=True)
class Plan:
    """How the layers of one group are factored.

    Args:
        shared: rank of the basis that they share; 0 where each has factors of its own.
        ranks: the rank of each where they share none; 0 leaves a layer dense.
    """

    shared: int = 0
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prices:
    """What is known of one group before a budget is shared out; all losses in nats per token.

    Args:
        layers: of the group.
        shared: curve of the shared basis and the rank of each of its choices; None where they share none.
        private: for each layer the curve of factors of its own, and the rank of each choice, 0: dense.
    """

    layers: tuple[LinearLayer, ...]
    shared: tuple[Curve, tuple[int, ...]] | None
    private: tuple[tuple[Curve, tuple[int, ...]], ...]

    def together(self) -> tuple[Curve, tuple[Plan, ...]]:
        """One curve of both: every rank of a shared basis, and what the layers would choose each for itself."""
        losses, costs, plans = [], [], []
        if self.shared is not None:
            curve, ranks = self.shared
            losses, costs = curve.losses.tolist(), curve.costs.tolist()
            plans = [Plan(shared=rank) for rank in ranks]
        for choice in self._private_choices():
            losses.append(sum(float(entry.losses[at]) for (entry, _), at in zip(self.private, choice, strict=True)))
            costs.append(sum(float(entry.costs[at]) for (entry, _), at in zip(self.private, choice, strict=True)))
            plans.append(Plan(ranks=tuple(ranks[at] for (_, ranks), at in zip(self.private, choice, strict=True))))
        points = torch.tensor([losses, costs], dtype=torch.float64)
        return Curve(self.layers[0].name, points[0], points[1]), tuple(plans)

    def _private_choices(self) -> list[tuple[int, ...]]:
        """Choices of all layers, each the best at one price of cost: points of their common lower hull."""
        scale = sum(float(curve.losses.max()) for curve, _ in self.private) or 1.0
        scale /= sum(float(curve.costs.max()) for curve, _ in self.private)
        found = {tuple(int(curve.costs.argmin()) for curve, _ in self.private)}
        for price in torch.logspace(4, -12, _PRICES, dtype=torch.float64).mul(scale).tolist():
            found.add(tuple(int((curve.losses + price * curve.costs).argmin()) for curve, _ in self.private))
        found.add(tuple(int(curve.losses.argmin()) for curve, _ in self.private))
        return sorted(found)


def sharing_groups(
    layers: Sequence[LinearLayer], shared: tuple[str, ...], size: int
) -> tuple[tuple[LinearLayer, ...], ...]:
    """The layers in groups: those that share a basis, and singly all others.

    A tensor of a block shares with the same tensor of the blocks that follow it among `layers`, `size` of them, where
    the shapes agree; at the end there may be fewer. Blocks of different stacks (encoder and decoder) do not mix.

    Args:
        layers: in the graph's order.
        shared: shell-style patterns on the names of tensors below their block.
        size: layers in one group, 1 or more.
    """
    series: dict[tuple[str, str, tuple[int, int]], list[LinearLayer]] = {}
    single: list[LinearLayer] = []
    for layer in layers:
        block, below = block_of(layer.name)
        if block is None or not any(fnmatchcase(below, pattern) for pattern in shared):
            single.append(layer)
            continue
        stack = layer.name.removesuffix(f"{block}.{below}")
        series.setdefault((stack, below, layer.shape), []).append(layer)
    groups: list[tuple[LinearLayer, ...]] = [(layer,) for layer in single]
    for members in series.values():
        members.sort(key=lambda layer: block_of(layer.name)[0] or 0)
        groups += [tuple(members[start : start + size]) for start in range(0, len(members), size)]
    order = {layer.weight: place for place, layer in enumerate(layers)}
    return tuple(sorted(groups, key=lambda group: order[group[0].weight]))


def shared_curve(
    group: Sequence[LinearLayer], discarded: torch.Tensor, pricing: Pricing, *, per_use: bool, multiple: int = 1
) -> tuple[Curve, tuple[int, ...]] | None:
    """The curve of a basis that a group shares, and its ranks; None where no rank saves anything.

    Args:
        group: two layers or more, of one shape.
        discarded: float64[K + 1], at [r] the loss of all layers together at rank r, in nats per token.
        pricing: of the budget's unit.
        per_use: whether that unit counts the basis anew for each layer that reads it (work), or once (size).
        multiple: ranks are multiples of it.
    """
    out, in_ = group[0].shape
    dense = sum(pricing.linear(out, in_, uses=len(layer.readers)) for layer in group)
    ranks = torch.arange(1, (len(discarded) - 1) // multiple + 1) * multiple
    if per_use:
        costs = sum(pricing.low_rank_curve(out, in_, ranks, uses=len(layer.readers)) for layer in group)
    else:
        costs = pricing.low_rank_curve(len(group) * out, in_, ranks)
    if not isinstance(costs, torch.Tensor) or not (costs < dense).any():
        return None
    saves = costs < dense
    curve = Curve(group[0].name, discarded[ranks][saves].clamp(min=0), costs[saves])
    return curve, tuple(int(rank) for rank in ranks[saves])


def private_curve(
    layer: LinearLayer, discarded: torch.Tensor, pricing: Pricing, *, multiple: int = 1
) -> tuple[Curve, tuple[int, ...]]:
    """The curve of a layer's own factors, and the rank of each choice; 0 is to stay dense."""
    curve, ranks = rank_curve(layer.name, discarded, layer.shape, pricing, multiple=multiple, uses=len(layer.readers))
    return curve, tuple(int(rank) for rank in ranks)
