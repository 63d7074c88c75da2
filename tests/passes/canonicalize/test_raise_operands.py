"""Queries, keys and values below what a model does to its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from skink.graph.capture import capture
from skink.graph.pattern import op_name
from skink.graph.program import Program
from skink.graph.propagate import expression
from skink.graph.rewriter import Rewriter
from skink.kernels import ROTARY
from skink.passes.canonicalize.raise_operands import Operand, operand_of, unrepeated, without_factors
from tests.modules import One, Three, results

K = torch.randn(2, 4, 5, 8)


def program_of(body: Callable[..., Tensor], x: Tensor = K) -> tuple[Program, fx.Node]:
    program = capture(One(body), (x,), dims={"x": {0: "B", 2: "T"}})
    return program, program.graph.output_node().args[0][0]


def built(program: Program, operand: Operand) -> str:
    """The ops that build an operand, whose shape is as it says."""
    rewriter = Rewriter(program, "test")
    with rewriter.before(program.graph.output_node()), rewriter.watching() as made:
        result = operand.build(rewriter)
    assert tuple(map(expression, result.meta["val"].shape)) == operand.shape
    return " ".join([op_name(entry) for entry in made])


@pytest.mark.parametrize(
    ("body", "turned", "calls"),
    [
        (lambda self, x: x, False, ""),
        (lambda self, x: x.transpose(-1, -2), True, ""),
        (lambda self, x: x.transpose(2, 3).float(), True, ""),
        (lambda self, x: x.permute(0, 1, 3, 2), True, ""),
        (lambda self, x: x.reshape(-1, *x.shape[2:]), False, ""),
        (lambda self, x: x.reshape(-1, *x.shape[2:]).transpose(1, 2), True, ""),
        (lambda self, x: x.transpose(2, 3).reshape(-1, 8, x.shape[2]), True, ""),
        (lambda self, x: x.relu(), True, "transpose"),
        (lambda self, x: x.transpose(2, 3).to(torch.int32).float().relu(), True, "transpose"),
        (lambda self, x: x.relu().flatten(0, 1), False, "unflatten"),
        (lambda self, x: x.relu().flatten(0, 1), True, "unflatten transpose"),
    ],
)
def test_operands(body: Callable[..., Tensor], turned: bool, calls: str) -> None:
    program, node = program_of(body)
    operand = operand_of(node, turned=turned, heads=4)
    assert built(program, operand) == calls
    if not calls:
        assert operand.node.op == "placeholder"


@pytest.mark.parametrize(
    ("body", "factor", "source"),
    [
        (lambda self, x: x * 2.0 / 8.0, 0.25, "placeholder"),
        (lambda self, x: (x * 2.0).transpose(2, 3) * 3.0, 6.0, "placeholder"),
        (lambda self, x: x.half() * 2.0, 2.0, "to"),
        (lambda self, x: x * x, 1.0, "mul"),
        (lambda self, x: x * 0.0, 1.0, "mul"),
        (lambda self, x: x.relu(), 1.0, "relu"),
    ],
)
def test_factors(body: Callable[..., Tensor], factor: float, source: str) -> None:
    _, node = program_of(body)
    operand, found = without_factors(node, turned=True, heads=0)
    assert found == factor
    assert (op_name(operand.node) or operand.node.op) == source


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.half])
def test_casts_that_take_digits_stay(dtype: torch.dtype) -> None:
    _, node = program_of(lambda self, x: x.transpose(2, 3).to(dtype).float())
    operand = operand_of(node, turned=True, heads=0)
    assert operand.turned
    assert op_name(operand.node) == "to"
    _, node = program_of(lambda self, x: repeated(x).to(dtype).float())
    assert unrepeated(Operand(node)) == Operand(node)


def repeated(x: Tensor, times: int = 3) -> Tensor:
    return x[:, :, None].expand(-1, -1, times, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


@pytest.mark.parametrize(
    ("body", "calls"),
    [
        (repeated, ""),
        (lambda x: x.repeat_interleave(3, 1), ""),
        (lambda x: x.repeat_interleave(3, dim=1).float(), ""),
        (lambda x: repeated(x).transpose(1, 2).transpose(1, 2), "transpose transpose"),
        (lambda x: x.transpose(1, 2).repeat_interleave(3, 2).permute(0, 2, 1, 3), "permute"),
    ],
)
def test_repeated_heads(body: Callable[[Tensor], Tensor], calls: str) -> None:
    program, node = program_of(lambda self, x: body(x))
    operand = unrepeated(Operand(node))
    assert operand.shape[1] == 4
    assert built(program, operand) == calls


def test_repeated_heads_that_were_turned_since() -> None:
    def body(self: Any, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        wide = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], 4, 1, 8)
        many = wide.expand(-1, -1, -1, 3, -1).reshape(x.shape[0], x.shape[2], 12, 8)
        return ROTARY.overload(many.transpose(1, 2), y, z)

    tables = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    dims = {"x": {0: "B", 2: "T"}, "y": {0: "B", 1: "T"}, "z": {0: "B", 1: "T"}}
    program = capture(Three(body), (K, *tables), dims=dims)
    output = program.graph.output_node()
    (node,) = output.args[0]
    rewriter = Rewriter(program, "test")
    with rewriter.before(output), rewriter.watching() as made:
        result = unrepeated(Operand(node)).build(rewriter)
    assert [op_name(entry) for entry in made] == ["squeeze", "transpose", "skink.rotary"]
    (whole,) = results(Three(body), K, *tables)
    output.args = ((result,),)
    program.graph_module.recompile()
    torch.testing.assert_close(program(K, *tables)[0], whole[:, ::3])


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x[:, None].expand(-1, 3, -1, -1, -1).reshape(x.shape[0], -1, *x.shape[2:]),
        lambda x: x.repeat(1, 3, 1, 1),
        lambda x: x.repeat_interleave(3, 3),
        lambda x: x[:, :, None].expand(-1, -1, 3, -1, -1).reshape(x.shape[0], 4, -1, 8),
        lambda x: repeated(x).relu(),
        lambda x: x.repeat_interleave(torch.tensor([3, 1, 2, 2]), 1, output_size=8),
        lambda x: x,
    ],
    ids=["tiled", "repeat", "features", "tokens", "changed", "uneven", "plain"],
)
def test_what_is_not_repeated_stays(body: Callable[[Tensor], Tensor]) -> None:
    _, node = program_of(lambda self, x: body(x))
    assert unrepeated(Operand(node)) == Operand(node)
