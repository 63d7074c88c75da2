"""What a language model's logits are of, and which linear layers give them: those are none of the budget's."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from skink.graph.program import Program
from skink.kernels import find_op

aten = torch.ops.aten


def output_heads(program: Program) -> frozenset[fx.Node]:
    """The linear nodes that give a language model's logits: as wide as its vocabulary, only scaled after them."""
    vocabularies = _vocabularies(program)
    heads: set[fx.Node] = set()
    for name, result in results_by_name(program).items():
        if isinstance(result, fx.Node):
            width = _width(result)
            if width is not None and (name == "logits" or width in vocabularies):
                heads.update(_linears_before(result, width))
    return frozenset(heads)


def predicts_next_tokens(program: Program) -> bool:
    """Whether `logits` are of the token after each one of `input_ids`: a number for each word, and nothing looks ahead.

    Args:
        program: canonical, since only there all attention is known as such.
    """
    logits = results_by_name(program).get("logits")
    if not isinstance(logits, fx.Node) or "input_ids" not in {entry.name for entry in program.inputs}:
        return False
    if logits.meta["val"].dim() != 3 or _width(logits) not in _vocabularies(program):
        return False
    return all(
        op.bind(node.args, node.kwargs)["causal"]
        for node in program.graph.nodes
        if node.op == "call_function" and (op := find_op(node.target)) and op.name == "attention"
    )


def results_by_name(program: Program) -> dict[str, Any]:
    """What the program returns, outputs first and then its state: a node, or a constant."""
    results = program.graph.output_node().args[0]
    flat = results if isinstance(results, list | tuple) else (results,)
    names = (*program.outputs, *(entry.output_name for entry in program.state))
    return dict(zip(names, flat, strict=True))


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
