"""Which weights of a program are linear layers, and what speaks against factoring one, whatever its size."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx

from skink.errors import GraphError, OptionError
from skink.graph.output_heads import output_heads
from skink.graph.passes import LayerRecord, PassResult, linear_weight
from skink.graph.pattern import NoMatch, op_name
from skink.graph.program import Program
from skink.graph.rewriter import Rewriter, describe

aten = torch.ops.aten

# What a router does with its scores before it picks experts: none of these mixes them with anything.
_SCORING = frozenset(
    {"softmax", "_softmax", "sigmoid", "to", "_to_copy", "type_as", "add", "mul", "div", "reshape", "view"}
)
_PICKING = frozenset({"topk", "argmax"})

CUT_SHORT = "the limit of edits was reached before it"


@dataclass(frozen=True)
class LinearLayer:
    """A weight that linear layers read.

    Args:
        weight: its qualified name.
        names: the layer's qualified name, and those of layers tied to it.
        shape: (out, in).
        readers: every linear node that reads it, in order.
        others: every other node that reads it.
    """

    weight: str
    names: tuple[str, ...]
    shape: tuple[int, int]
    readers: tuple[fx.Node, ...]
    others: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        """The layer's qualified name: the weight's, less `.weight`."""
        return self.names[0]

    @property
    def parameters(self) -> int:
        """Parameters of the weight."""
        return self.shape[0] * self.shape[1]

    def matches(self, patterns: tuple[str, ...]) -> bool:
        """Whether one of the layer's names fits one of the shell-style patterns."""
        return any(fnmatchcase(name, pattern) for name in self.names for pattern in patterns)


class Choice:
    """The layers that a pass works on, and the book it keeps about all of them. Iterating gives those to work on.

    Args:
        layers: every linear layer of the program, in the graph's order.
    """

    def __init__(self, layers: Sequence[LinearLayer]) -> None:
        self.layers = tuple(layers)
        self._chosen = {layer.weight: layer for layer in layers}
        self._records: dict[str, LayerRecord] = {}
        self._refused: list[NoMatch] = []

    def __iter__(self) -> Iterator[LinearLayer]:
        return iter(list(self._chosen.values()))

    def __len__(self) -> int:
        return len(self._chosen)

    def leave(self, layer: LinearLayer, reason: str) -> None:
        """Keep a layer dense that the user did not ask for."""
        self._chosen.pop(layer.weight, None)
        self._records[layer.weight] = LayerRecord(
            name=layer.name,
            kind="linear",
            shape=layer.shape,
            decision="kept dense",
            parameters_before=layer.parameters,
            parameters_after=layer.parameters,
            reason=reason,
        )

    def refuse(self, layer: LinearLayer, reason: str) -> None:
        """Keep a layer dense that the user did ask for, and say why."""
        self.leave(layer, reason)
        self._refused.append(NoMatch(reason, layer.readers[0]))

    def record(self, layer: LinearLayer, record: LayerRecord, *, done: bool = True) -> None:
        """Put down what was done to a layer, or that the rewriter's limit came before it."""
        if done:
            self._records[layer.weight] = record
        else:
            self.leave(layer, CUT_SHORT)

    def result(self, rewriter: Rewriter, notes: Sequence[str] = ()) -> PassResult:
        """What the pass returns: one record for each layer, in the graph's order."""
        records = [self._records[layer.weight] for layer in self.layers if layer.weight in self._records]
        return PassResult(edits=rewriter.count, refused=tuple(self._refused), layers=tuple(records), notes=tuple(notes))


def notes_on_few_tokens(seen: Iterable[tuple[str, int, int]], then: str) -> list[str]:
    """One note for all layers that see less calibration text than it takes to tell their inputs apart, or none.

    Args:
        seen: (name, tokens, input features) of layers.
        then: what becomes of such layers.
    """
    short = [(tokens / features, name, tokens, features) for name, tokens, features in seen if tokens < features]
    if not short:
        return []
    _, name, tokens, features = min(short)
    others = f", and too few for {len(short) - 1} others" if len(short) > 1 else ""
    return [f"{name}: {tokens} tokens of calibration text for {features} input features{others}; {then}"]


def choose_layers(
    program: Program, pass_name: str, targets: tuple[str, ...], ignore: tuple[str, ...]
) -> tuple[Choice, list[str]]:
    """The layers that a pass may work on, and notes on patterns that fit none.

    They are what `keep` counts: the targets, or every linear layer, less those ignored, those that the graph speaks
    against (output heads unless named, tied weights, thin factors, routers of experts) and those that are not finite.

    Args:
        program: with linear layers in view.
        pass_name: for messages.
        targets: shell-style patterns on qualified names; empty: every linear layer.
        ignore: patterns of layers to leave alone.

    Raises:
        GraphError: GRAPH-002 where a chosen weight is on the meta device.
        OptionError: OPTION-002 where there are targets and none fits a layer.
    """
    layers = linear_layers(program)
    notes = _check_patterns(pass_name, layers, targets, ignore)
    heads = output_heads(program)
    choice = Choice(layers)
    for layer in layers:
        if targets and not layer.matches(targets):
            choice.leave(layer, "not among the targets")
        elif layer.matches(ignore):
            choice.leave(layer, "ignored, as asked")
        elif (reason := structural_reason(layer, heads, asked=bool(targets))) is not None:
            choice.refuse(layer, reason)
        elif program.weight(layer.weight).is_meta:
            raise GraphError(
                "GRAPH-002",
                f"the weight {layer.weight!r} is on the meta device: it has a shape but no values to factor.",
                where=describe(layer.readers[0]),
                fix="load the checkpoint with its weights, then capture again.",
            )
        elif not torch.isfinite(program.weight(layer.weight)).all():
            choice.refuse(layer, "the weight is not finite")
    return choice, notes


def _check_patterns(
    pass_name: str, layers: list[LinearLayer], targets: tuple[str, ...], ignore: tuple[str, ...]
) -> list[str]:
    """Notes on patterns that fit no layer; an error where that leaves nothing to do."""
    idle = [pattern for pattern in targets if not any(layer.matches((pattern,)) for layer in layers)]
    if idle and len(idle) == len(targets):
        names = [layer.name for layer in layers]
        raise OptionError(
            "OPTION-002",
            f"{pass_name}.targets={list(targets)} match none of the {len(names)} linear layers.",
            why=f"layers are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}.",
            fix="use shell-style patterns on these names, as '*.mlp.*'.",
        )
    idle += [pattern for pattern in ignore if not any(layer.matches((pattern,)) for layer in layers)]
    return [f"no linear layer is named like {pattern!r}." for pattern in idle]


def linear_layers(program: Program) -> list[LinearLayer]:
    """Every stored matrix that a linear layer multiplies by, in the graph's order."""
    readers: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        name = linear_weight(program, node)
        if name is not None and node.args[1].meta["val"].dim() == 2:
            readers.setdefault(name, []).append(node)
    users: dict[str, list[fx.Node]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        users.setdefault(str(node.target), []).extend(node.users)
    return [
        LinearLayer(
            weight=name,
            names=tuple(
                tied.removesuffix(".weight")
                for tied in (name, *(alias for alias, owner in program.aliases.items() if owner == name))
            ),
            shape=_shape(program.weight(name)),
            readers=tuple(nodes),
            others=tuple(user for user in users[name] if user not in nodes),
        )
        for name, nodes in readers.items()
    ]


def structural_reason(layer: LinearLayer, heads: frozenset[fx.Node], *, asked: bool) -> str | None:
    """Why the graph speaks against factoring a layer, if it does.

    Args:
        layer: see `linear_layers`.
        heads: from `output_heads`.
        asked: whether the user named the layer; then an output head is no objection.
    """
    if layer.others:
        readers = ", ".join(sorted({op_name(node) for node in layer.others}))
        return f"the weight is tied: {readers} reads it too"
    if not asked and not heads.isdisjoint(layer.readers):
        return "it is the output head; name it in targets to factor it"
    if any(_is_factor(node) for node in layer.readers):
        return "it is already one of two thin factors"
    if any(_routes(node) for node in layer.readers):
        return "it routes tokens to experts: a small error would pick others"
    return None


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _is_factor(node: fx.Node) -> bool:
    """Whether this linear node is part of a product of two thin matrices."""
    return _is_down(node) or (isinstance(node.args[0], fx.Node) and _is_down(node.args[0]))


def _is_down(node: fx.Node) -> bool:
    """Whether the linear nodes that read this one, and all that do, have a dense one's numbers or fewer with it.

    Where the node's own output is used beside what one linear node makes of it, it is the kept rows of a matrix.
    """
    if node.target is not aten.linear.default:
        return False
    ups = [user for user in node.users if user.target is aten.linear.default and user.args[0] is node]
    joins = [user for user in node.users if user.target is aten.cat.default]
    if not ups or len(ups) + len(joins) != len(node.users) or len(joins) > 1:
        return False
    rank, in_features = node.args[1].meta["val"].shape  # type: ignore[union-attr]
    if joins:
        return joins[0].args[0] == [node, *ups]
    # A basis that several layers share is one weight with several readers.
    shared = [other for other in _readers(node) if other is not node]
    ups += [user for other in shared for user in other.users if user.target is aten.linear.default]
    out_features = sum(up.args[1].meta["val"].shape[0] for up in ups)  # type: ignore[union-attr]
    return bool(rank * (out_features + in_features) <= out_features * in_features)


def _readers(node: fx.Node) -> list[fx.Node]:
    """The linear nodes that read the same stored weight as this one."""
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return [node]
    stored = node.graph.find_nodes(op="get_attr", target=weight.target)
    return [user for entry in stored for user in entry.users if user.target is aten.linear.default]


def _routes(node: fx.Node) -> bool:
    """Whether the output is scores by which experts are picked."""
    pending, seen = list(node.users), set[fx.Node]()
    while pending:
        user = pending.pop()
        if op_name(user) in _PICKING:
            return True
        if user not in seen and op_name(user) in _SCORING:
            seen.add(user)
            pending.extend(user.users)
    return False
