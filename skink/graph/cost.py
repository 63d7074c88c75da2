"""What a program costs: parameters, bytes, and multiply-accumulates per generated token."""

import math
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from skink.graph.output_heads import head_weights
from skink.graph.passes import linear_weight
from skink.graph.program import Program
from skink.graph.propagate import shape_context
from skink.kernels import EXPERTS, find_op

aten = torch.ops.aten

_PRODUCTS = (aten.mm.default, aten.bmm.default, aten.matmul.default, aten.addmm.default, aten.baddbmm.default)


@dataclass(frozen=True)
class ProgramCost:
    """Size and work of a program.

    Args:
        parameters: trained weights, tied ones once.
        linear_parameters: those of the weights of linear layers, the output head aside.
        bytes: of the trained weights.
        macs_per_token: multiply-accumulates of products, attention and chosen experts to generate one token.
        context: how many tokens of context that token attends to.
        linear_bytes: of the weights in `linear_parameters`.
        linear_macs_per_token: of the products with them.
    """

    parameters: int
    linear_parameters: int
    bytes: int
    macs_per_token: int
    context: int
    linear_bytes: int
    linear_macs_per_token: int


def program_cost(program: Program, *, context: int = 512) -> ProgramCost:
    """The cost of a program; works on meta weights too."""
    shape_context(program)  # every node has its value from here on
    trained = [(name, tensor) for name, tensor in program.weights() if name not in program.buffers]
    weights = linear_weights(program)
    linear = [tensor for name, tensor in trained if name in weights]
    return ProgramCost(
        parameters=sum(tensor.numel() for _, tensor in trained),
        linear_parameters=sum(tensor.numel() for tensor in linear),
        bytes=sum(tensor.numel() * tensor.element_size() for _, tensor in trained),
        macs_per_token=sum(_macs(node, context) for node in program.graph.nodes),
        context=context,
        linear_bytes=sum(tensor.numel() * tensor.element_size() for tensor in linear),
        linear_macs_per_token=sum(
            _macs(node, context) for node in program.graph.nodes if linear_weight(program, node) in weights
        ),
    )


def linear_weights(program: Program) -> frozenset[str]:
    """Names of the weights of linear layers, without the output head's and without a table of embeddings.

    They are what a budget is about, and what reports call the linear layers.
    """
    read = {linear_weight(program, node) for node in program.graph.nodes} - {None}
    tables = {
        node.args[0].target
        for node in program.graph.find_nodes(op="call_function", target=aten.embedding.default)
        if node.args[0].op == "get_attr"
    }
    return frozenset(str(name) for name in read) - tables - head_weights(program)


def _macs(node: fx.Node, context: int) -> int:
    if node.target is aten.linear.default:
        return _elements(node) * _sizes(node.args[0])[-1]
    if node.target in _PRODUCTS:
        left = node.args[1] if node.target in (aten.addmm.default, aten.baddbmm.default) else node.args[0]
        return _elements(node) * _sizes(left)[-1]
    op = find_op(node.target)
    if op is EXPERTS:
        arguments = op.bind(node.args, node.kwargs)
        chosen = _elements(arguments["chosen"])
        return chosen * sum(math.prod(_sizes(arguments[name])[1:]) for name in ("up", "down"))
    if op is None or op.state is None:
        return 0
    # One token's query against `context` keys, or as many as a window holds.
    arguments = op.bind(node.args, node.kwargs)
    query, value = _sizes(arguments["query"]), _sizes(arguments["value"])
    keys = min(context, arguments["window"]) if arguments["window"] else context
    return query[1] * keys * (query[3] + value[3])


def _elements(node: fx.Node) -> int:
    return math.prod(_sizes(node))


def _sizes(node: Any) -> list[int]:
    """The shape of a node's value for one sequence and one new token."""
    sizes = []
    for size in node.meta["val"].shape:
        if isinstance(size, torch.SymInt):
            # Sizes that depend on values, as tokens for one expert do, count as one too.
            one: dict[sympy.Basic, int] = {symbol: 1 for symbol in size.node.expr.free_symbols}
            sizes.append(int(size.node.expr.subs(one)))
        else:
            sizes.append(int(size))
    return sizes
