"""Which weights of a program are linear layers, and what speaks against factoring one, whatever its size."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx

from skink.graph.passes import linear_weight
from skink.graph.pattern import op_name
from skink.graph.program import Program

aten = torch.ops.aten

# What a router does with its scores before it picks experts: none of these mixes them with anything.
_SCORING = frozenset(
    {"softmax", "_softmax", "sigmoid", "to", "_to_copy", "type_as", "add", "mul", "div", "reshape", "view"}
)
_PICKING = frozenset({"topk", "argmax"})


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


def output_heads(program: Program) -> frozenset[fx.Node]:
    """The linear nodes that give a language model's logits: as wide as its vocabulary, only scaled after them."""
    output = program.graph.output_node()
    results = output.args[0] if isinstance(output.args[0], list | tuple) else (output.args[0],)
    vocabularies = {
        table.meta["val"].shape[0]
        for node in program.graph.find_nodes(op="call_function", target=aten.embedding.default)
        if isinstance(table := node.args[0], fx.Node)
    }
    names = (*program.outputs, *(entry.output_name for entry in program.state))
    heads: set[fx.Node] = set()
    for name, result in zip(names, results, strict=True):
        if isinstance(result, fx.Node):
            width = _width(result)
            if width is not None and (name == "logits" or width in vocabularies):
                heads.update(_linears_before(result, width))
    return frozenset(heads)


def _linears_before(node: fx.Node, width: int) -> Iterator[fx.Node]:
    """The nearest linear nodes that `node` comes from along values of one width."""
    pending, seen = [node], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in seen or node.op != "call_function" or _width(node) != width:
            continue
        seen.add(node)
        if node.target is aten.linear.default:
            yield node
        else:
            pending.extend(node.all_input_nodes)


def _width(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.shape[-1] if isinstance(value, Tensor) and value.dim() and isinstance(value.shape[-1], int) else None


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _is_factor(node: fx.Node) -> bool:
    """Whether this linear node and one right before or after it are a product of two thin matrices."""
    return any(_are_factors(node, user) for user in node.users) or (
        isinstance(node.args[0], fx.Node) and _are_factors(node.args[0], node)
    )


def _are_factors(down: fx.Node, up: fx.Node) -> bool:
    if down.target is not aten.linear.default or up.target is not aten.linear.default or up.args[0] is not down:
        return False
    rank, in_features = down.args[1].meta["val"].shape  # type: ignore[union-attr]
    out_features = up.args[1].meta["val"].shape[0]  # type: ignore[union-attr]
    return bool(rank * (out_features + in_features) <= out_features * in_features)


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
