"""The parts of a model whose inner width can shrink, each with its prices: feed-forward blocks, values, scores.

    feed-forward    inner channels of up (and gate) and down
    value-output    width of the value heads, the same for all heads of a layer
    query-key       width of the heads that are multiplied to scores; the scale of the scores stays as it was

A part is planned from the moments of its weights, which gives the price of every width, and then cut to one of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, fx

from skink.graph.blocks import FeedForward
from skink.graph.calibration import Covariance
from skink.graph.gradients import Moments
from skink.graph.program import Program
from skink.passes.decompose.reduce_width.attention import Attention, Branch
from skink.passes.decompose.reduce_width.channels import (
    compensated,
    elimination_order,
    head_bases,
    head_order,
    leverage_order,
    prices,
    smoothed,
)
from skink.passes.decompose.reduce_width.edits import Heads
from skink.passes.decompose.selection import LinearLayer

Kind = Literal["feed-forward", "value-output", "query-key"]
Method = Literal["two-sided", "one-sided", "leverage"]

# Share of the mean of G's diagonal that is added to it, against directions that no token of the text pulled at.
GRADIENT_DAMPING = 0.05


class Part(ABC):
    """One width that can shrink.

    Attributes:
        kind: see `Kind`.
        name: qualified name of the block.
        layers: the layers that it changes.
        lead: the one of them whose record says what the part loses.
        width: the width now.
        losses: float64[width + 1] on the CPU: predicted rise of the loss at each width, in nats per token; inf for a
            width that cannot be had; None before it is planned, or without gradients.
        prices_need: weights whose moments the prices need.
        edited: the node whose edit narrows it; parts with the same one are narrowed together.
        cut_needs: the weight whose inputs' covariance the cut needs; empty where it needs none.
    """

    kind: Kind
    name: str
    layers: tuple[LinearLayer, ...]
    lead: LinearLayer
    width: int
    losses: Tensor | None = None
    prices_need: tuple[str, ...]
    edited: fx.Node
    cut_needs: str = ""

    @abstractmethod
    def shapes(self, width: int) -> list[tuple[str, int, int]]:
        """(weight, out, in) of what it is made of, at a width; a fused weight once for each piece of it."""

    def can_have(self, width: int) -> bool:
        """Whether there is such a width, once it is planned."""
        return 0 < width <= self.width

    @abstractmethod
    def plan(self, program: Program, inputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None) -> None:
        """Order what may go, and price it.

        Args:
            program: where the weights are.
            inputs: Cbar of each of `prices_need`, float64[in, in], a mean over tokens.
            gradients: Gbar, likewise; None where they were not asked for.
        """


class FeedForwardPart(Part):
    """The inner channels of a feed-forward block."""

    kind: Kind = "feed-forward"

    def __init__(self, block: FeedForward, layers: tuple[LinearLayer, ...], lead: LinearLayer, method: Method) -> None:
        self.block, self.layers, self.lead, self.method = block, layers, lead, method
        self.name, self.width, self.edited = block.module, block.width, block.output
        self.prices_need = (lead.weight,)
        self.cut_needs = lead.weight
        self.order = torch.arange(self.width)

    def shapes(self, width: int) -> list[tuple[str, int, int]]:
        """See `Part.shapes`."""
        into = [(layer.weight, width, layer.shape[1]) for layer in self.layers if layer is not self.lead]
        if len(into) == 1 and self.block.gate is not None:
            into *= 2  # one product makes gate and up
        return [*into, (self.lead.weight, self.lead.shape[0], width)]

    def plan(self, program: Program, inputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None) -> None:
        """See `Part.plan`."""
        weight, covariance = program.weight(self.lead.weight).double(), inputs[self.lead.weight]
        metric = smoothed(gradients[self.lead.weight], GRADIENT_DAMPING) if gradients is not None else None
        if self.method == "leverage":
            self.order = leverage_order(covariance)
        else:
            self.order = elimination_order(weight, covariance, metric if self.method == "two-sided" else None)
        if metric is not None:
            self.losses = prices(weight, covariance, metric, self.order).cpu()

    def cut(self, program: Program, width: int, covariance: Tensor) -> tuple[dict[str, Tensor], float]:
        """New weights by name, and the relative error of the block's output."""
        kept = self.order[:width].sort().values
        weight = program.weight(self.lead.weight)
        new = {self.lead.weight: compensated(weight.double(), covariance, kept)}
        rows: dict[str, list[Tensor]] = {}
        parts = [part for part in (self.block.gate, self.block.up) if part is not None]
        for part in sorted(parts, key=lambda part: part.rows):
            for name in (part.weight, part.bias):
                if name:
                    rows.setdefault(name, []).append(kept + part.rows[0])
        for name, places in rows.items():
            new[name] = program.weight(name)[torch.cat(places)]
        return new, relative_error(weight.double(), new[self.lead.weight], kept, covariance)


class ValuePart(Part):
    """The width of the value heads of one attention."""

    kind: Kind = "value-output"

    def __init__(
        self, attention: Attention, layers: tuple[LinearLayer, ...], lead: LinearLayer, method: Method
    ) -> None:
        self.attention, self.layers, self.lead, self.method = attention, layers, lead, method
        self.branch, self.edited = branch_of(attention, "value"), attention.node
        self.heads, self.width = attention.columns.shape
        self.key_heads = len(self.branch.rows)
        self.name = lead.name.rpartition(".")[0]
        self.prices_need, self.cut_needs = (lead.weight,), lead.weight
        self.bases = torch.eye(self.width, dtype=torch.float64).expand(self.key_heads, -1, -1)

    def shapes(self, width: int) -> list[tuple[str, int, int]]:
        """See `Part.shapes`."""
        inner = int(self.branch.linear.args[1].meta["val"].shape[1])  # type: ignore[union-attr]
        out = self.lead.shape[0]
        return [(self.branch.weight, self.key_heads * width, inner), (self.lead.weight, out, self.heads * width)]

    def plan(self, program: Program, inputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None) -> None:
        """See `Part.plan`."""
        weight, covariance = self._by_head(program, inputs[self.lead.weight])
        metric = smoothed(gradients[self.lead.weight], GRADIENT_DAMPING) if gradients is not None else None
        left = metric if self.method == "two-sided" else None
        shape = (self.heads, self.width)
        self.bases = head_bases(weight.unflatten(1, shape), covariance.view(*shape, *shape), left, self.key_heads)
        if metric is not None:
            weight, covariance = self._turned(weight, covariance)
            self.losses = prices(weight, covariance, metric, head_order(*shape))[:: self.heads].cpu()

    def cut(self, program: Program, width: int, covariance: Tensor) -> tuple[Heads, Tensor, float]:
        """The new value projection, the new output weight, and the relative error of the output."""
        turned, inside = self._turned(*self._by_head(program, covariance))
        kept = torch.arange(self.heads * self.width).view(self.heads, self.width)[:, :width].flatten()
        output = compensated(turned, inside, kept)
        old = heads_of(program, self.branch)
        readers = self.bases[:, :width]
        new = torch.einsum("grd,gdi->gri", readers, old.weight.double().unflatten(0, (self.key_heads, -1)))
        bias = old.bias
        if bias is not None:
            bias = torch.einsum("grd,gd->gr", readers, bias.double().unflatten(0, (self.key_heads, -1))).flatten()
        error = relative_error(turned, output, kept, inside)
        return Heads(new.flatten(0, 1), bias, self.key_heads), output, error

    def _by_head(self, program: Program, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """The output weight and its inputs' covariance with features head after head."""
        columns = self.attention.columns.flatten()
        return program.weight(self.lead.weight).double()[:, columns], covariance[columns][:, columns]

    def _turned(self, weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """The same in the bases of the heads."""
        turn = torch.block_diag(*self.bases.repeat_interleave(self.heads // self.key_heads, 0))
        return weight @ turn.mT, turn @ covariance @ turn.mT


def branch_of(attention: Attention, name: str) -> Branch:
    """The branch of this name, where it can be narrowed."""
    branch = getattr(attention, name)
    if not isinstance(branch, Branch):
        raise TypeError(f"{name}: {branch}")
    return branch


def heads_of(program: Program, branch: Branch) -> Heads:
    """The projection of a branch as it is, head after head, with its factor put into it."""
    rows = branch.rows.flatten()
    weight = program.weight(branch.weight)[rows]
    bias = program.weight(branch.bias)[rows] if branch.bias else None
    if branch.factor != 1.0:
        weight, bias = weight * branch.factor, bias * branch.factor if bias is not None else None
    return Heads(weight, bias, len(branch.rows))


def means(moments: Mapping[str, Moments] | Mapping[str, Covariance]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Cbar and Gbar of each weight; no Gbar where there are inputs alone."""
    inputs, gradients = {}, {}
    for name, found in moments.items():
        covariance = found.inputs if isinstance(found, Moments) else found
        inputs[name] = covariance.total / max(covariance.tokens, 1)
        if isinstance(found, Moments):
            gradients[name] = found.gradients.total / max(found.gradients.tokens, 1)
    return inputs, gradients


def relative_error(weight: Tensor, new: Tensor, kept: Tensor, covariance: Tensor) -> float:
    """||X (W - W' S^T)^T|| / ||X W^T|| from C, for the channels `kept`."""
    change = weight.clone()
    change[:, kept] -= new
    total = float((weight @ covariance * weight).sum())
    return (max(0.0, float((change @ covariance * change).sum())) / total) ** 0.5 if total > 0 else 0.0
