"""Gradients over many batches, region by region: forward through all regions, then backward from the last to the first.

Going forward, what a region receives is kept, for every batch. Going backward, each region runs again with gradients
on: so memory holds the values between regions, and the insides of one region for one batch. Where even the values
between regions are too many, they are kept for every k-th region of k^2 only, and made again from those for the k - 1
after it, at the price of another run forward (Chen et al. 2016, arXiv 1604.06174, section 4.1).
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map

from skink.graph.passes import Progress
from skink.graph.program import Program
from skink.graph.regions import Region, inputs_of, plan_region, report, run_plan, split_regions

# Most bytes of values between regions that are all kept.
_HELD = 4 * 2**30

Received = list[dict[fx.Node, Any]]
"""What a region receives from those before it, for each batch."""

Gradients = dict[fx.Node, list[Tensor | None]]
"""Of each value that a region hands on: one for each tensor in it."""


class Objective(Protocol):
    """What gradients are taken of: a sum over nodes, one for each of some random draws."""

    @property
    def nodes(self) -> Collection[fx.Node]:
        """The nodes."""

    @property
    def draws(self) -> int:
        """How many draws."""

    @property
    def observes(self) -> bool:
        """Whether `observe` must see the values of all batches before the first gradient is asked for."""

    def observe(self, node: fx.Node, value: Tensor, batch: int) -> None:
        """The value of one of the nodes for one batch, in the forward run."""

    def gradient(self, node: fx.Node, value: Tensor, batch: int, draw: int) -> Tensor:
        """The gradient at one of the nodes, of its shape and dtype."""


@dataclass(frozen=True)
class Layer:
    """What one batch gives at one linear layer.

    Args:
        node: the layer.
        input: float[..., in].
        gradients: at its output, float[..., out] for each draw; None where nothing depends on it.
    """

    node: fx.Node
    input: Tensor
    gradients: Sequence[Tensor | None]


Collect = Callable[[int, Sequence[Layer]], None]
"""Called with the number of a batch and the layers of one region."""


def run_backward(
    program: Program,
    batches: Sequence[Mapping[str, Tensor]],
    objective: Objective,
    collect: Collect,
    *,
    layers: Collection[fx.Node],
    progress: Progress | None = None,
) -> Iterator[Region]:
    """Yield each region, the last one first, when gradients of all batches have passed it.

    Regions before the first that holds one of `layers` are left out. While a region is in the caller's hands, the
    caller may edit it and those after it.

    Args:
        program: not stepped; no weight gets a gradient.
        batches: tensors by input name, on the device of the weights.
        objective: what gradients are of.
        collect: called once per region and batch.
        layers: linear nodes whose inputs and gradients are wanted.
        progress: called after each batch in each region, forward and backward.

    Raises:
        GraphError: GRAPH-002 where weights are on the meta device.
    """
    regions = split_regions(program, {*layers, *objective.nodes})
    inputs = inputs_of(program, batches)
    first = next(region.index for region in regions if not region.nodes.isdisjoint(layers))
    ahead = regions if objective.observes else regions[:-1]
    forward = _Forward(program, inputs, (len(ahead) + len(regions) - first) * len(batches), progress)
    received: dict[int, Received] = {0: [{} for _ in batches]}
    spacing = 1
    for region in ahead:
        here = region.index
        # Before the first region that gradients reach, nothing need be kept.
        keep = here >= first and (here - first) % spacing == 0
        received[here + 1] = forward.run(region, received[here], objective if objective.observes else None)
        if not keep:
            del received[here]
        elif here == first:
            spacing = _spacing(received[here + 1], len(regions) - first)

    carried: list[list[Gradients]] = [[{} for _ in range(objective.draws)] for _ in batches]
    for region in reversed(regions[first:]):
        for missing in range(max(index for index in received if index <= region.index), region.index):
            forward.steps += len(batches)
            received[missing + 1] = forward.run(regions[missing], received[missing])
        entries = received.pop(region.index)
        step = _Step(program, region, set(entries[0]), objective, layers, is_first=region.index == first)
        for index, values in enumerate(inputs):
            found, carried[index] = step.run(values, entries[index], carried[index], index)
            # What this batch kept here is free as soon as it is used.
            entries[index] = {}
            collect(index, found)
            del found
            forward.report()
        yield region


class _Forward:
    """Runs all batches through one region, and counts the steps of both directions."""

    def __init__(
        self, program: Program, inputs: Sequence[Mapping[fx.Node, Any]], steps: int, progress: Progress | None
    ) -> None:
        self._program, self._inputs, self._progress = program, inputs, progress
        self.steps, self._done = steps, 0

    def run(self, region: Region, received: Received, objective: Objective | None = None) -> Received:
        """What the next region receives; `objective` sees its nodes."""
        seen = frozenset(region.wanted).intersection(objective.nodes) if objective is not None else frozenset()
        plan = plan_region(self._program.graph, [*region.carried, *seen], set(received[0]))
        following = []
        for index, values in enumerate(self._inputs):
            visit = None if objective is None else partial(_observe, objective, index)
            following.append(run_plan(self._program, plan, {**values, **received[index]}, region.carried, visit, seen))
            self.report()
        return following

    def report(self) -> None:
        """One more step is done."""
        self._done = report(self._progress, self._done, self.steps)


def _observe(objective: Objective, batch: int, node: fx.Node, value: Tensor) -> None:
    objective.observe(node, value, batch)


def _spacing(received: Received, regions: int) -> int:
    """For every how many regions to keep what they receive, when each receives about as much as this."""
    tensors = [tensor for values in received for tensor in tree_flatten(list(values.values()))[0]]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
    return 1 if held * regions <= _HELD else math.ceil(math.sqrt(regions))


class _Step:
    """One region, backward."""

    def __init__(
        self,
        program: Program,
        region: Region,
        entries: set[fx.Node],
        objective: Objective,
        layers: Collection[fx.Node],
        *,
        is_first: bool,
    ) -> None:
        self._program, self._carried, self._objective, self._is_first = program, region.carried, objective, is_first
        self._layers = [node for node in region.wanted if node in layers]
        self._outputs = [node for node in region.wanted if node in objective.nodes]
        self._sources = {node.all_input_nodes[0] for node in self._layers}
        self._visited = frozenset((*self._layers, *self._outputs))
        # Inputs of layers are results too, so that they are still there at the end.
        self._results = [*dict.fromkeys((*self._carried, *self._sources))]
        self._plan = plan_region(program.graph, [*self._results, *self._visited], entries)

    def run(
        self, inputs: Mapping[fx.Node, Any], entries: Mapping[fx.Node, Any], carried: Sequence[Gradients], batch: int
    ) -> tuple[list[Layer], list[Gradients]]:
        """What one batch gives at the layers, and the gradients of what the region received, one for each draw."""
        leaves = {node: value if self._is_first else tree_map(_leaf, value) for node, value in entries.items()}
        seen: dict[fx.Node, Tensor] = {}
        results = run_plan(
            self._program,
            self._plan,
            {**inputs, **leaves},
            self._results,
            seen.__setitem__,
            self._visited,
            training=True,
        )
        at_entry = [(node, _floats(value)) for node, value in leaves.items()] if not self._is_first else []
        targets = [seen[node] for node in self._layers]
        targets += [tensor for _, tensors in at_entry for tensor in tensors]
        at_layers: list[list[Tensor | None]] = [[] for _ in self._layers]
        given: list[Gradients] = []
        for draw in range(self._objective.draws):
            heads, gradients = self._heads(results, seen, carried[draw], batch, draw)
            found = _gradients(heads, targets, gradients, keep=draw + 1 < self._objective.draws)
            for collected in at_layers:
                collected.append(next(found))
            given.append({node: [next(found) for _ in tensors] for node, tensors in at_entry})
        layers = [
            Layer(node, results[node.all_input_nodes[0]].detach(), gradients)
            for node, gradients in zip(self._layers, at_layers, strict=True)
        ]
        return layers, given

    def _heads(
        self, results: Mapping[fx.Node, Any], seen: Mapping[fx.Node, Tensor], carried: Gradients, batch: int, draw: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Where gradients come in, and these."""
        pairs = [
            (tensor, gradient)
            for node in self._carried
            for tensor, gradient in zip(_floats(results[node]), carried.get(node, ()), strict=False)
            if gradient is not None and tensor.requires_grad
        ]
        pairs += [
            (seen[node], self._objective.gradient(node, seen[node].detach(), batch, draw))
            for node in self._outputs
            if seen[node].requires_grad
        ]
        return [tensor for tensor, _ in pairs], [gradient for _, gradient in pairs]


def _leaf(value: Any) -> Any:
    """The value, with a gradient of its own where it can have one."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def _floats(value: Any) -> list[Tensor]:
    """The tensors in a value that can have gradients; most values are one tensor."""
    return [entry for entry in tree_flatten(value)[0] if isinstance(entry, Tensor) and entry.is_floating_point()]


def _gradients(
    heads: list[Tensor], targets: list[Tensor], gradients: list[Tensor], *, keep: bool
) -> Iterator[Tensor | None]:
    """The gradient at each target; None where no head depends on it."""
    if not heads or not targets:
        return iter([None] * len(targets))
    return iter(torch.autograd.grad(heads, targets, gradients, retain_graph=keep, allow_unused=True))
