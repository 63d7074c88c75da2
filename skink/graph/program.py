"""`Program`: a model as a graph, with what a bare `fx.GraphModule` lacks.

A program is functional: every tensor is an input, a weight or the result of a node, no op writes in place, and nothing
is remembered between calls. It runs in eager at every stage.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from skink.errors import GraphError

# The input that says which tokens are padding: int64[B, T]; in a step graph it covers the past too.
PADDING_INPUT = "attention_mask"


class Stage(IntEnum):
    """How far a program has come; each stage has its own rules, which the verifier holds it to."""

    CAPTURED = 0
    CANONICAL = 1
    REWRITTEN = 2
    STEPPED = 3
    LOWERED = 4

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Input:
    """One input: its name, dtype and dims, each a number or the name of a symbolic dim (`"B"`)."""

    name: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class StateInput:
    """One tensor of a stepped program's state.

    Args:
        name: `past_key_values.{layer}.{key|value|...}`, the name of the input; the output is `present.{...}`.
        layer: number of the op that owns it, counted along the graph.
        shape: dims as in `Input`; the token axis of a growing state is symbolic.
        growth: `append`, `ring` or `fixed`.
        axis: the token axis.
        limit: for `ring`, the most tokens kept.
    """

    name: str
    layer: int
    shape: tuple[int | str, ...]
    growth: str
    axis: int
    limit: int = 0

    @property
    def output_name(self) -> str:
        """The output that holds the new state."""
        return self.name.replace("past_key_values", "present", 1)


@dataclass(frozen=True)
class Edit:
    """One rewrite, as the log keeps it.

    Args:
        index: its place among all edits of the program; what a limit counts and `skink bisect` finds.
        pass_name: the pass that made it.
        rule: the rule that made it.
        node: name of the node that went, or that changed.
        qualified_name: the module that the node came from.
        detail: more about it, in the words of the rule.
        source: file and line that the node came from.
        error: how much the program's results differ from the captured model's after it, where that was measured.
    """

    index: int
    pass_name: str
    rule: str
    node: str
    qualified_name: str
    detail: str = ""
    source: str = ""
    error: float | None = None


@dataclass
class Program:
    """A captured model.

    Args:
        graph_module: the graph; weights are `get_attr` nodes whose targets are qualified names.
        inputs: in the order of the graph's placeholders.
        outputs: names of the results, in order.
        buffers: the weights that are not trained.
        aliases: other names of a weight → its name in the graph (tied embeddings).
        any_dtype: whether casts in the graph follow the weights' dtype, so that it runs in whichever the weights have.
        stage: see `Stage`.
        state: tensors carried from step to step, for a stepped program.
        edits: every rewrite so far.
        origin: where it came from (`model_type`, `config`, `name`, versions), plain JSON values; `longest` holds the
            largest sizes of dims that the model has tables for, where its tables bound them.
    """

    graph_module: fx.GraphModule
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    buffers: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    any_dtype: bool = False
    stage: Stage = Stage.CAPTURED
    state: tuple[StateInput, ...] = ()
    edits: list[Edit] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        return self.graph_module.graph

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that the graph reads, each once, in the order of first use."""
        seen: set[str] = set()
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target not in seen:
                seen.add(node.target)
                yield node.target, self.weight(node.target)

    def weight(self, name: str) -> Tensor:
        """One weight by its qualified name (or by the name of another that it is tied to)."""
        owner_path, _, leaf = self.aliases.get(name, name).rpartition(".")
        tensor: Tensor = getattr(self.graph_module.get_submodule(owner_path), leaf)
        return tensor

    def set_weight(self, name: str, tensor: Tensor, *, buffer: bool = False) -> None:
        """Add a weight, or put another tensor in a weight's place; tensors are never written to."""
        store_weight(self.graph_module, name, tensor, buffer=buffer)
        if buffer:
            self.buffers = self.buffers | {name}

    def stored_weights(self) -> list[str]:
        """Names of all weights that are kept, whether a node reads them or not."""
        parameters = self.graph_module.named_parameters(remove_duplicate=False)
        buffers = self.graph_module.named_buffers(remove_duplicate=False)
        return [name for name, _ in (*parameters, *buffers)]

    def drop_unused_weights(self) -> None:
        """Forget the weights that no node reads any more, and the names tied to them."""
        used = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        for name in self.stored_weights():
            if name not in used:
                owner_path, _, leaf = name.rpartition(".")
                delattr(self.graph_module.get_submodule(owner_path), leaf)
        self.buffers = self.buffers & used
        self.aliases = {alias: name for alias, name in self.aliases.items() if name in used}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's trained weights."""
        for name, tensor in self.weights():
            if name not in self.buffers and tensor.is_floating_point():
                return tensor.dtype
        return torch.get_default_dtype()

    @property
    def is_meta(self) -> bool:
        """Whether some weight has a shape but no values."""
        return any(tensor.is_meta for _, tensor in self.weights())

    def __call__(self, *args: Tensor | None, **kwargs: Tensor) -> Any:
        """Run the graph in eager; inputs, and a stepped program's state, by position or by name.

        Raises:
            GraphError: GRAPH-002 where weights are on the meta device, GRAPH-003 where inputs are missing, unknown or
                given twice.
        """
        if self.is_meta:
            raise GraphError(
                "GRAPH-002",
                "this program's weights are on the meta device: it has shapes but no values to run with.",
                fix="load the checkpoint with its weights, then capture again.",
            )
        self._check_call(len(args), kwargs)
        ordered = [*args, *(kwargs[name] for name in self._input_names()[len(args) :])]
        with torch.no_grad():
            return self.graph_module(*ordered)

    def _input_names(self) -> list[str]:
        return [*(entry.name for entry in self.inputs), *(entry.name for entry in self.state)]

    def _check_call(self, positional: int, named: Iterable[str]) -> None:
        names = self._input_names()
        rest, given = names[positional:], list(named)
        wrong = [name for name in given if name not in rest]
        missing = [name for name in rest if name not in given]
        if positional > len(names):
            what = f"{positional} inputs were given to a program that takes {len(names)}."
        elif wrong:
            what = (
                f"the input {wrong[0]!r} was given twice." if wrong[0] in names else f"there is no input {wrong[0]!r}."
            )
        elif missing:
            what = f"the input {missing[0]!r} is missing."
        else:
            return
        raise GraphError("GRAPH-003", what, fix=f"its inputs, in order: {', '.join(names)}.")

    def module(self, *, copy: bool = True) -> nn.Module:
        """The model as an `nn.Module` that takes the program's inputs in order.

        Parameters sit in `nn.Linear` and `nn.Embedding` children under the original names; it trains, saves and
        compiles like any module. With `copy=False` it shares its tensors with the program.
        """
        from skink.graph.emit import EmittedModule

        return EmittedModule(self, copy=copy)

    def clone(self) -> "Program":
        """A copy whose graph can be edited on its own; weights are shared, since nothing writes to them."""
        root = nn.Module()
        for name, tensor in self.weights():
            store_weight(root, name, tensor, buffer=name in self.buffers)
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        result = graph.graph_copy(self.graph, values)
        output = graph.output(result)
        output.meta = dict(next(iter(reversed(self.graph.nodes))).meta)
        for old, new in values.items():
            new.meta = dict(old.meta)
        graph_module = fx.GraphModule(root, graph)
        graph_module.meta.update(self.graph_module.meta)
        return replace(
            self,
            graph_module=graph_module,
            aliases=dict(self.aliases),
            edits=list(self.edits),
            origin=dict(self.origin),
        )

    def with_dtype(self, dtype: torch.dtype, *, shapes_only: bool = False) -> "Program":
        """A copy with its trained weights in `dtype`; buffers, such as rotary frequencies, keep theirs.

        With `shapes_only` its weights are on the meta device, without values.
        """
        from skink.graph.dtypes import with_dtype

        return with_dtype(self, dtype, shapes_only=shapes_only)

    def __str__(self) -> str:
        from skink.graph.propagate import shape_context
        from skink.graph.text import print_program

        shape_context(self)
        return print_program(self)


@cache
def _taken_names() -> frozenset[str]:
    return frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))


def is_taken(name: str) -> bool:
    """Whether a weight of this name would lie in an attribute that torch.fx keeps for itself."""
    return name.partition(".")[0] in _taken_names()


def store_weight(root: nn.Module, name: str, tensor: Tensor, *, buffer: bool = False) -> None:
    """Put `tensor` at the dotted path `name` below `root`, making plain modules on the way."""
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        child = owner._modules.get(part)
        if child is None:
            child = nn.Module()
            owner.add_module(part, child)
        owner = child
    owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)
    if buffer or not tensor.is_floating_point():
        owner.register_buffer(leaf, tensor.detach())
    else:
        owner.register_parameter(leaf, nn.Parameter(tensor.detach(), requires_grad=False))
