"""Ways to factor the layers of a program, and what each would lose: one weight at a time, or several stacked.

Layers that read one activation (q, k and v; gate and up) may be factored as one weight, one above the other: they then
share the thin factor that reads it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from skink.graph.calibration import Covariance, stream_covariances
from skink.graph.gradients import Moments, stream_moments
from skink.graph.objective import Labels
from skink.graph.passes import Context, Progress
from skink.graph.program import Program
from skink.passes.decompose.factorize.factorize import (
    Factorization,
    Solver,
    factorize,
    plain_truncation_energy,
    truncation_energy,
)
from skink.passes.decompose.selection import LinearLayer

Method = Literal["two-sided", "whitened", "asvd", "fisher", "plain"]

# What a method knows of a weight: of its inputs, and of both its sides.
Known = tuple[Covariance | None, Moments | None]


@dataclass(frozen=True)
class Stack:
    """One layer, or several that read one activation, as one weight."""

    layers: tuple[LinearLayer, ...]

    @property
    def name(self) -> str:
        """The layers' names."""
        return " + ".join(layer.name for layer in self.layers)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs of all, in)."""
        return sum(layer.shape[0] for layer in self.layers), self.layers[0].shape[1]

    @property
    def uses(self) -> int:
        """How many times each token passes through it."""
        return len(self.layers[0].readers)

    def weight(self, program: Program) -> Tensor:
        """[outputs of all, in]."""
        weights = [program.weight(layer.weight) for layer in self.layers]
        return torch.cat(weights) if len(weights) > 1 else weights[0]

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The rows of a tensor that are each layer's."""
        return tuple(rows.split([layer.shape[0] for layer in self.layers]))


@dataclass(frozen=True)
class Candidate:
    """A stack and its factors at every rank that may be taken.

    Args:
        stack: which layers.
        factors: of its weight.
        losses: float64[K + 1], at [r] what rank r adds to the loss, in nats per token; None where the method knows not.
        layer_losses: the same for each layer of the stack alone.
        output: float64[K + 1], the square of the error of the output; None without inputs.
        baseline: likewise of the plain truncated SVD; None where it was not asked for.
        tokens: of calibration text; None where none was needed.
    """

    stack: Stack
    factors: Factorization
    losses: Tensor | None = None
    layer_losses: tuple[Tensor, ...] | None = None
    output: Tensor | None = None
    baseline: Tensor | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Recipe:
    """How to factor: the options of `LowRank` that matter here, see there."""

    method: Method
    left_damping: float
    right_damping: float
    alpha: float
    labels: Labels
    samples: int
    baseline: bool


def groups(layers: Sequence[LinearLayer], *, share: bool) -> list[tuple[LinearLayer, ...]]:
    """Layers that could be factored together, in the graph's order; each by itself where `share` is off."""
    found: dict[object, list[LinearLayer]] = {}
    for layer in layers:
        alone = not share or len(layer.readers) > 1 or not isinstance(layer.readers[0].args[0], fx.Node)
        found.setdefault(layer.weight if alone else layer.readers[0].args[0], []).append(layer)
    return [tuple(group) for group in found.values()]


def stream_metrics(
    program: Program, names: Sequence[str], recipe: Recipe, context: Context, progress: Progress
) -> Iterator[dict[str, Known]]:
    """What the method has to know of each weight, a few weights at a time."""
    if not names:
        return
    if recipe.method == "plain":
        for name in names:
            yield {name: (None, None)}
        return
    windows = context.calibration_for(f"method={recipe.method}")
    if recipe.method in ("whitened", "asvd"):
        for inputs in stream_covariances(program, windows, names, progress=progress, padding=context.padding):
            yield {name: (inputs.pop(name), None) for name in list(inputs)}
        return
    for moments in stream_moments(
        program,
        windows,
        names,
        labels=recipe.labels,
        samples=recipe.samples,
        seed=context.seed,
        progress=progress,
        row_fisher=recipe.method == "fisher",
        padding=context.padding,
    ):
        yield {name: (moments[name].inputs, moments.pop(name)) for name in list(moments)}


def candidate(
    program: Program,
    stack: Stack,
    known: Sequence[Known],
    recipe: Recipe,
    rank: int,
    *,
    solver: Solver = "exact",
) -> Candidate:
    """A stack's factors up to `rank`, from what is known of each of its layers."""
    weight = stack.weight(program)
    inputs, moments = known[0][0], [both for _, both in known if both is not None]
    blocks = [both.gradients.total for both in moments]
    left, right = _metrics(recipe, inputs, moments, blocks)
    factors = factorize(
        weight,
        left=left,
        right=right,
        rank=rank,
        left_damping=recipe.left_damping,
        right_damping=recipe.right_damping,
        solver=solver,
    )
    if inputs is None:
        return Candidate(stack, factors)
    exact = right is inputs.total
    output = factors.output if exact else truncation_energy(weight, factors.up, factors.down, right=inputs.total)
    losses = layer_losses = None
    if moments:
        gradients = left if recipe.method == "two-sided" else _block_diagonal(blocks)
        energy = (
            factors.discarded
            if recipe.method == "two-sided"
            else truncation_energy(weight, factors.up, factors.down, left=gradients, right=inputs.total)
        )
        losses = energy * (0.5 * moments[0].uses / (inputs.tokens * moments[0].gradients.tokens))
        layer_losses = _layer_losses(stack, factors, losses, blocks, weight, inputs) if len(blocks) > 1 else (losses,)
    baseline = None
    if recipe.baseline:
        baseline = plain_truncation_energy(weight, inputs.total, rank)
    return Candidate(stack, factors, losses, layer_losses, output, baseline, inputs.tokens)


def _metrics(
    recipe: Recipe, inputs: Covariance | None, moments: Sequence[Moments], blocks: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    if inputs is None:
        return None, None
    if recipe.method == "asvd":
        if inputs.absolute is None:
            raise RuntimeError("the mean size of inputs is not known")
        return None, (inputs.absolute / inputs.tokens).pow(2 * recipe.alpha)
    if recipe.method == "fisher":
        return torch.cat([both.row_fisher for both in moments if both.row_fisher is not None]), None
    return _block_diagonal(blocks) if recipe.method == "two-sided" else None, inputs.total


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    return torch.block_diag(*blocks) if len(blocks) > 1 else blocks[0]


def _layer_losses(
    stack: Stack,
    factors: Factorization,
    losses: Tensor,
    blocks: Sequence[Tensor],
    weight: Tensor,
    inputs: Covariance,
) -> tuple[Tensor, ...]:
    """What each layer of a stack adds to its loss: components count for each in proportion to their energy in it."""
    parts = torch.stack(
        [
            (up.double() * (block @ up.double())).sum(0).clamp(min=0)
            for block, up in zip(blocks, stack.split(factors.up), strict=True)
        ]
    )
    shares = parts / parts.sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    wholes = torch.stack(
        [
            ((block @ rows.double()) * (rows.double() @ inputs.total)).sum()
            for block, rows in zip(blocks, stack.split(weight), strict=True)
        ]
    )
    gone = torch.cat((losses.new_zeros(len(blocks), 1), (shares * -losses.diff()).cumsum(1)), dim=1)
    return tuple(
        (wholes / wholes.sum().clamp(min=torch.finfo(torch.float64).tiny) * losses[0])[:, None].sub(gone).clamp(min=0)
    )
