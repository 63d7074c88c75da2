"""The width of query and key heads: which features go, and what that costs.

Dropping a feature of a head's queries drops its product with the keys' feature, and so the keys' could as well be
dropped: both price the same change, and the price is their mean. With q = W x + b and gradients g at q,

    price of the features S = 1/2 sum over i, j in S of (mean of g g^T)_ij (mean of q q^T)_ij

Features that rotary turns together go together, and the same pairs in all heads of a layer, since these share one table
of angles. Features without rotary are each head's own choice (MoDeGPT, arXiv 2408.09632, section 3.2: type II, "CR").
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from skink.graph.program import Program
from skink.passes.decompose.reduce_width.attention import Attention, Branch, pairs
from skink.passes.decompose.reduce_width.channels import unit_order
from skink.passes.decompose.reduce_width.edits import Heads
from skink.passes.decompose.reduce_width.parts import Kind, Method, Part, branch_of, heads_of
from skink.passes.decompose.selection import LinearLayer


class ScorePart(Part):
    """The width of the query and key heads of one attention."""

    kind: Kind = "query-key"

    def __init__(
        self, attention: Attention, layers: tuple[LinearLayer, ...], lead: LinearLayer, method: Method
    ) -> None:
        self.attention, self.layers, self.lead, self.method = attention, layers, lead, method
        self.query, self.key = branch_of(attention, "query"), branch_of(attention, "key")
        self.edited = attention.node
        self.heads, self.width = self.query.rows.shape
        self.key_heads = len(self.key.rows)
        self.name = lead.name.rpartition(".")[0]
        self.prices_need = tuple(dict.fromkeys((self.query.weight, self.key.weight)))
        # Features of each key head that are left at a width, in order: int64[Hk, width].
        self.kept: dict[int, Tensor] = {}
        # float64[in]: the mean input, for biases.
        self.mean: Tensor | None = None

    @property
    def biased(self) -> bool:
        """Whether the mean of the inputs is wanted, for the part of a bias in the outputs."""
        return bool(self.query.bias or self.key.bias)

    def shapes(self, width: int) -> list[tuple[str, int, int]]:
        """See `Part.shapes`."""
        inner = int(self.query.linear.args[1].meta["val"].shape[1])  # type: ignore[union-attr]
        return [(self.query.weight, self.heads * width, inner), (self.key.weight, self.key_heads * width, inner)]

    def can_have(self, width: int) -> bool:
        """See `Part.can_have`."""
        return width in self.kept

    def plan(self, program: Program, inputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None) -> None:
        """See `Part.plan`."""
        queries, keys = (
            _outputs(program, branch, inputs[branch.weight], self.mean) for branch in (self.query, self.key)
        )
        price = None
        if gradients is not None:
            # Without the queries' feature its keys do not count, nor the other way round: both price the same change.
            price = torch.zeros(self.key_heads, self.width, self.key_heads, self.width, dtype=torch.float64)
            for branch, outputs in ((self.query, queries), (self.key, keys)):
                rows = branch.rows.flatten()
                metric = gradients[branch.weight][rows][:, rows]
                price += self._by_key_head(metric * outputs, len(branch.rows)) / 4
        if price is not None and self.method == "two-sided":
            chosen = price
        else:
            chosen = self._by_key_head(queries.diagonal().diag(), self.heads)
            chosen = chosen * self._by_key_head(keys.diagonal().diag(), self.key_heads)
        units = self._units(chosen)
        order = unit_order(_over_units(chosen, units), [unit.shape[1] for unit in units])
        self._keep(units, order)
        if price is not None:
            table = _over_units(price, units)
            self.losses = torch.full((self.width + 1,), torch.inf, dtype=torch.float64)
            width = self.width
            for count in range(len(units)):
                gone = order[:count]
                if width in self.kept:
                    self.losses[width] = table[gone][:, gone].sum().clamp(min=0)
                width -= units[int(order[count])].shape[1]

    def cut(self, program: Program, width: int) -> tuple[dict[str, Heads], Tensor | None]:
        """The new query and key projections, and which columns of the rotary tables stay; None for all."""
        kept = self.kept[width]
        new = {}
        for name, branch, groups in (("query", self.query, self.heads // self.key_heads), ("key", self.key, 1)):
            old = heads_of(program, branch)
            heads = len(branch.rows)
            features = kept.repeat_interleave(groups, 0)
            rows = (torch.arange(heads)[:, None] * self.width + features).flatten()
            new[name] = Heads(old.weight[rows], old.bias[rows] if old.bias is not None else None, heads)
        _, turned = pairs(self.query)
        columns = kept[0][kept[0] < turned] if turned else None
        return new, columns if columns is not None and len(columns) < turned else None

    def _by_key_head(self, matrix: Tensor, heads: int) -> Tensor:
        """[H D, H D] summed over the query heads of each key head: float64[Hk, D, Hk, D] on the CPU."""
        shape = (self.key_heads, heads // self.key_heads, self.width)
        return matrix.view(*shape, *shape).sum((1, 4)).cpu()

    def _units(self, price: Tensor) -> list[Tensor]:
        """Features that go together: rotary pairs of all heads, or one feature of each head: int64[Hk, features]."""
        together, turned = pairs(self.query)
        units = [torch.tensor(pair).expand(self.key_heads, -1) for pair in together]
        free = torch.arange(turned, self.width)
        if len(free):
            # Each head lets its own features go, the least important of every head together.
            orders = [
                free[unit_order(price[head][:, head][free][:, free], [1] * len(free))] for head in range(self.key_heads)
            ]
            units += [torch.stack([order[level] for order in orders])[:, None] for level in range(len(free))]
        return units

    def _keep(self, units: list[Tensor], order: Tensor) -> None:
        together, turned = pairs(self.query)
        self.kept = {}
        for count in range(len(order)):
            left = [units[index] for index in order[count:].tolist()]
            features = torch.cat(left, 1).sort(1).values
            # Rotary needs one pair at least.
            if not together or bool((features[0] < turned).any()):
                self.kept[features.shape[1]] = features


def _outputs(program: Program, branch: Branch, covariance: Tensor, mean: Tensor | None) -> Tensor:
    """Second moments of a projection's outputs, bias and all, head after head: float64[H D, H D]."""
    rows = branch.rows.flatten()
    weight = program.weight(branch.weight).double()[rows]
    outputs = weight @ covariance @ weight.mT
    if branch.bias and mean is not None:
        bias = program.weight(branch.bias).double()[rows]
        crossed = torch.outer(weight @ mean, bias)
        outputs = outputs + crossed + crossed.mT + torch.outer(bias, bias)
    return outputs


def _over_units(price: Tensor, units: list[Tensor]) -> Tensor:
    """`price` [Hk, D, Hk, D] summed over the features of each two units: float64[U, U]."""
    heads, width = price.shape[:2]
    member = torch.zeros(len(units), heads, width, dtype=torch.float64)
    for index, unit in enumerate(units):
        member[index].scatter_(1, unit, 1.0)
    flat = member.flatten(1)
    return flat @ price.reshape(heads * width, heads * width) @ flat.mT
