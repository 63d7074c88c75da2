"""Run a program's graph on a module's layers, in one go or in segments that are computed anew for the backward pass.

Layers are looked up in the module at every call, as an emitted module does it (skink/graph/emit.py): what PEFT or a
user has put in a layer's place is what runs. Ops of Skink run by the first of their kernels that gradients flow
through.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from skink.graph.emit import embedding_owner, linear_owner
from skink.graph.program import PADDING_INPUT, Program
from skink.graph.regions import kernel_for, plan_region, split_regions
from skink.graph.state import without_padding
from skink.training.loop.breakdown import damaged
from skink.training.loop.options import Precision

# What weights may be stored in, and products be computed in; sums and norms never are.
LOW = (torch.float16, torch.bfloat16)

aten = torch.ops.aten


class Weights(Protocol):
    """Where a graph's weights come from."""

    def layer(self, path: str) -> Callable[[Tensor], Tensor] | None:
        """What stands for a linear or embedding layer; None where there are no layers, only tensors."""

    def tensor(self, name: str) -> Tensor:
        """A weight by its name in the graph."""


class ModuleWeights:
    """The weights of a module that `Program.module` made, as it is now."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def layer(self, path: str) -> Callable[[Tensor], Tensor] | None:
        """The layer at this path."""
        return self._module.get_submodule(path)

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of this name."""
        path, _, leaf = name.rpartition(".")
        value: Tensor = getattr(self._module.get_submodule(path), leaf)
        return value


class StoredWeights:
    """A program's own weights, not copied; on another device once they were moved."""

    def __init__(self, program: Program) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in program.weights()}
        self._buffers = program.buffers

    def layer(self, path: str) -> Callable[[Tensor], Tensor] | None:
        """None: there are no layers."""
        return None

    def tensor(self, name: str) -> Tensor:
        """The weight of this name."""
        return self._tensors[name]

    def damaged(self) -> str:
        """Which is the first that is not finite, a sentence; empty where all are. Buffers may hold a mask."""
        trained = ((name, tensor) for name, tensor in self._tensors.items() if name not in self._buffers)
        return damaged(trained, "the teacher's")

    def __deepcopy__(self, memo: Any) -> "StoredWeights":
        # Tensors are shared, since nothing writes to them; moving one of the two leaves the other where it is.
        return copy.copy(self)

    def move(self, device: Callable[[Tensor], torch.device]) -> None:
        """Put each weight on the device that is said of it; but none on the meta device, where its values would go.

        A module is sent there on its way to being sharded, and has its values put back; these would not be.
        """
        places = {name: device(tensor) for name, tensor in self._tensors.items()}
        self._tensors = {
            name: tensor if places[name].type == "meta" else tensor.to(places[name])
            for name, tensor in self._tensors.items()
        }


@dataclass(frozen=True)
class _Step:
    """One call: its node, the layer that computes it (empty where none), and the values that nothing reads after it."""

    node: fx.Node
    layer: str
    spent: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Segment:
    """Calls in a row: the values that come in beside the inputs, and those that go out."""

    steps: tuple[_Step, ...]
    entries: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]


class Runs:
    """Some values of a program, by one graph for batches with padding and by a quicker one for those without.

    Attention that no key is hidden from runs in kernels that know its mask by name and need not read it.

    Args:
        program: as of `Segments`, as are the other arguments.
    """

    def __init__(
        self, program: Program, results: Sequence[fx.Node], *, precision: Precision, recompute: bool = False
    ) -> None:
        self._padded = Segments(program, results, precision=precision, recompute=recompute)
        whole = without_padding(program)
        nodes = {node.name: node for node in whole.graph.nodes}
        self._whole = Segments(whole, [nodes[node.name] for node in results], precision=precision, recompute=recompute)

    @property
    def weights(self) -> frozenset[str]:
        """Names of the weights that the results depend on."""
        return self._padded.weights

    def run(self, weights: Weights, inputs: Mapping[str, Tensor]) -> list[Any]:
        """As `Segments.run`."""
        mask = inputs.get(PADDING_INPUT)
        padded = mask is not None and not bool((mask != 0).all())
        return (self._padded if padded else self._whole).run(weights, inputs)


class Segments:
    """Some values of a program, computed from its inputs.

    Args:
        program: its graph; its weights are not read.
        results: nodes whose values are wanted; what they do not depend on is not run.
        precision: float32: weights in half precision are read as float32, and autocast is for the caller to leave off.
            Otherwise autocast is for the caller to turn on; vectors and embedded tokens are then float32, so that sums
            and norms are, and matrices are read as they are stored.
        recompute: cut the graph between regions (skink/graph/regions.py) and keep only what goes from one to the next;
            the backward pass computes the rest anew (Chen et al. 2016, arXiv 1604.06174).
    """

    def __init__(
        self, program: Program, results: Sequence[fx.Node], *, precision: Precision, recompute: bool = False
    ) -> None:
        self._results, self._whole = tuple(results), precision == "float32"
        self._placeholders = dict(
            zip((entry.name for entry in program.inputs), program.graph.find_nodes(op="placeholder"), strict=True)
        )
        self._segments: list[_Segment] = []
        if not recompute:
            self._add(program, (), self._results)
            return
        entries: tuple[fx.Node, ...] = ()
        for region in split_regions(program, self._results):
            self._add(program, entries, (*region.carried, *(node for node in region.wanted if node in self._results)))
            entries = region.carried

    @property
    def weights(self) -> frozenset[str]:
        """Names of the weights that the results depend on."""
        return frozenset(
            str(node.target)
            for segment in self._segments
            for step in segment.steps
            for node in step.node.all_input_nodes
            if node.op == "get_attr"
        )

    def run(self, weights: Weights, inputs: Mapping[str, Tensor]) -> list[Any]:
        """The results, in order.

        Args:
            weights: where weights come from.
            inputs: tensors by input name.
        """
        given = {node: inputs[name] for name, node in self._placeholders.items()}
        found: dict[fx.Node, Any] = {}
        for index, segment in enumerate(self._segments):
            entries = [found[node] for node in segment.entries]
            for node in segment.entries:
                if node not in self._results:
                    del found[node]
            # The last one is computed anew at once, which would save nothing.
            if torch.is_grad_enabled() and index + 1 < len(self._segments):
                values = checkpoint(self._run, segment, given, weights, *entries, use_reentrant=False)
            else:
                values = self._run(segment, given, weights, *entries)
            del entries
            found.update(zip(segment.results, values, strict=True))
        return [found[node] for node in self._results]

    def __deepcopy__(self, memo: Any) -> "Segments":
        # Nothing in it ever changes, and graphs with symbolic sizes cannot be copied this way.
        return self

    def _add(self, program: Program, entries: Sequence[fx.Node], results: Sequence[fx.Node]) -> None:
        results = tuple(dict.fromkeys(results))
        plan = plan_region(program.graph, results, entries)
        here = {node for node, _ in plan}
        layers = {node: linear_owner(program, node) or embedding_owner(node) or "" for node in here}
        steps = []
        for node, spent in plan:
            # A weight that is its layer's own is read with the layer.
            if node.op != "get_attr" or not all(layers[user] for user in node.users if user in here):
                steps.append(_Step(node, layers[node], tuple(spent)))
        self._segments.append(_Segment(tuple(steps), tuple(entries), results))

    def _run(self, segment: _Segment, given: Mapping[fx.Node, Any], weights: Weights, *entries: Any) -> list[Any]:
        values = {**given, **dict(zip(segment.entries, entries, strict=True))}
        for step in segment.steps:
            values[step.node] = self._compute(step, values, weights)
            for spent in step.spent:
                values.pop(spent, None)
        return [values[node] for node in segment.results]

    def _compute(self, step: _Step, values: Mapping[fx.Node, Any], weights: Weights) -> Any:
        node = step.node
        if node.op == "get_attr":
            return self._read(weights.tensor(str(node.target)))
        embeds = node.target is aten.embedding.default
        layer = weights.layer(step.layer) if step.layer else None
        if layer is not None:
            value: Any = layer(values[node.all_input_nodes[1 if embeds else 0]])
        else:
            # A table of tokens is not cast for the sake of a few rows: the rows are.
            read = weights.tensor if embeds else lambda name: self._read(weights.tensor(name))

            def argument(operand: fx.Node) -> Any:
                return values[operand] if operand in values else read(str(operand.target))

            args, kwargs = fx.map_arg(node.args, argument), fx.map_arg(node.kwargs, argument)
            value = kernel_for(node.target, args, kwargs, training=True)(*args, **kwargs)
        return value.float() if embeds and value.dtype in LOW else value

    def _read(self, tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in LOW and (self._whole or tensor.dim() < 2) else tensor
