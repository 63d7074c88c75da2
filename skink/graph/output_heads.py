"""Which linear layers give a language model's logits, and so are no linear layers of the budget."""

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from skink.graph.program import Program

aten = torch.ops.aten


def output_heads(program: Program) -> frozenset[fx.Node]:
    """The linear nodes that give a language model's logits: as wide as its vocabulary, only scaled after them."""
    output = program.graph.output_node()
    results = output.args[0] if isinstance(output.args[0], list | tuple) else (output.args[0],)
    vocabularies = _vocabularies(program)
    names = (*program.outputs, *(entry.output_name for entry in program.state))
    heads: set[fx.Node] = set()
    for name, result in zip(names, results, strict=True):
        if isinstance(result, fx.Node):
            width = _width(result)
            if width is not None and (name == "logits" or width in vocabularies):
                heads.update(_linears_before(result, width))
    return frozenset(heads)


def _vocabularies(program: Program) -> set[int]:
    """Rows of the tables that token ids index; tables of positions and of kinds of text are no vocabularies."""
    names = [entry.name for entry in program.inputs]
    places = program.graph.find_nodes(op="placeholder")
    tokens = places[names.index("input_ids") if "input_ids" in names else 0] if names else None
    return {
        table.meta["val"].shape[0]
        for node in program.graph.find_nodes(op="call_function", target=aten.embedding.default)
        if node.args[1] is tokens and isinstance(table := node.args[0], fx.Node)
    }


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


def head_weights(program: Program) -> frozenset[str]:
    """Names of the stored weights that give the logits: the output head's, both where it is factored."""
    names = set()
    for head in output_heads(program):
        names.add(head.args[1])
        inner = head.args[0]
        if isinstance(inner, fx.Node) and are_factors(inner, head):
            names.add(inner.args[1])
    return frozenset(str(weight.target) for weight in names if isinstance(weight, fx.Node) and weight.op == "get_attr")


def are_factors(down: fx.Node, up: fx.Node) -> bool:
    """Whether two linear nodes, one on the other, are a product of two thin matrices."""
    if down.target is not aten.linear.default or up.target is not aten.linear.default or up.args[0] is not down:
        return False
    rank, in_features = down.args[1].meta["val"].shape  # type: ignore[union-attr]
    out_features = up.args[1].meta["val"].shape[0]  # type: ignore[union-attr]
    return bool(rank * (out_features + in_features) <= out_features * in_features)
