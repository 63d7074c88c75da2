"""Random programs of supported ops, for property tests: built node by node, in float64 against rounding."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import fx, nn

from skink.graph.program import Input, Program, Stage, store_weight
from skink.graph.propagate import propagate

aten = torch.ops.aten
WIDTH = 4

_UNARY = (aten.neg.default, aten.relu.default, aten.tanh.default, aten.abs.default, aten.sin.default, aten.cos.default)
_BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor)
_KINDS = ("unary", "unary", "twice", "binary", "number", "linear", "cast", "reshape", "sum", "pair")
_NUMBERS = (1, 2, -1.0, 0.5)


@st.composite
def programs(draw: Any, least: int = 1, most: int = 14) -> Program:
    """A program on x, y: f64[B,T,4] with `least` to `most` steps of a call or a few and one or two results."""
    graph, root = fx.Graph(), nn.Module()
    for name, rows in (("w", WIDTH), ("v", WIDTH)):
        generator = torch.Generator().manual_seed(rows + len(name) * ord(name))
        store_weight(root, name, torch.randn(WIDTH, rows, generator=generator, dtype=torch.float64) / 2)
    values = [graph.placeholder("x"), graph.placeholder("y")]
    weights = [graph.get_attr("w"), graph.get_attr("v")]
    for _ in range(draw(st.integers(least, most))):
        # Recent values more often than old ones: deep graphs match more.
        one, other = (values[-1 - draw(st.integers(0, min(3, len(values) - 1)))] for _ in range(2))
        match draw(st.sampled_from(_KINDS)):
            case "unary":
                node = graph.call_function(draw(st.sampled_from(_UNARY)), (one,))
            case "twice":
                node = graph.call_function(draw(st.sampled_from(_UNARY)), (one,))
                node = graph.call_function(draw(st.sampled_from(_UNARY)), (node,))
            case "pair":
                pair = _pair(draw, graph, one, other, weights)
                node = graph.call_function(draw(st.sampled_from(_BINARY)), pair)
            case "binary":
                node = graph.call_function(draw(st.sampled_from(_BINARY)), (one, other))
            case "number":
                node = graph.call_function(draw(st.sampled_from(_BINARY)), (one, draw(st.sampled_from(_NUMBERS))))
            case "linear":
                node = graph.call_function(aten.linear.default, (one, draw(st.sampled_from(weights))))
            case "cast":
                node = graph.call_function(aten.to.dtype, (one, torch.float64))
            case "reshape":
                node = graph.call_function(aten.transpose.int, (one, 0, 1))
                node = graph.call_function(aten.transpose.int, (node, 0, 1))
            case _:
                node = graph.call_function(aten.sum.dim_IntList, (one, [-1], True))
                node = graph.call_function(aten.tanh.default, (node,))
                node = graph.call_function(aten.add.Tensor, (other, node))
        values.append(node)
    results = values[-1:] if draw(st.booleans()) else values[-2:]
    graph.output(tuple(results))
    inputs = tuple(Input(name, torch.float64, ("B", "T", WIDTH)) for name in ("x", "y"))
    names = tuple(f"result_{index}" for index in range(len(results)))
    program = Program(fx.GraphModule(root, graph), inputs, names, stage=Stage.CANONICAL)
    propagate(program)
    return program


def example_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Values for `x` and `y`."""
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(2, 3, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def _pair(draw: Any, graph: fx.Graph, one: fx.Node, other: fx.Node, weights: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """Two calls alike, as rules about sums of products and their like want them."""
    match draw(st.sampled_from(["one op", "one value", "linear", "factor"])):
        case "one op":
            op = draw(st.sampled_from(_UNARY))
            return graph.call_function(op, (one,)), graph.call_function(op, (other,))
        case "one value":
            ops = draw(st.permutations(_UNARY))[:2]
            return graph.call_function(ops[0], (one,)), graph.call_function(ops[1], (one,))
        case "linear":
            calls = [graph.call_function(aten.linear.default, (one, weight)) for weight in weights]
        case _:
            factor = graph.call_function(aten.cos.default, (one,))
            calls = [graph.call_function(aten.mul.Tensor, (value, factor)) for value in (one, other)]
    return calls[0], calls[1]
