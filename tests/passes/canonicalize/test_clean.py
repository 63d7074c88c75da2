"""Clean-ups: what goes, what stays, and the same numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skink.graph.pattern import op_name
from skink.graph.rewriter import Rewriter
from skink.passes.canonicalize.clean import clean
from tests.modules import One, Two, parameter, results
from tests.programs import canonicalized

X = torch.randn(2, 3, 4)


def left(body: Any, x: Tensor = X, **parts: Any) -> list[str]:
    """Names of the ops that are left of `body`, whose numbers are verified."""
    module = One(body, **parts)
    program, _ = canonicalized(module, x)
    for one, other in zip(program(x), results(module, x), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, equal_nan=True)
    return [op_name(node) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x: x.contiguous().relu(),
        lambda self, x: x.clone().relu(),
        lambda self, x: x.detach().relu(),
        lambda self, x: x[:, :, :].relu(),
        lambda self, x: x[..., :4].relu(),
        lambda self, x: x.expand(-1, -1, 4).relu(),
        lambda self, x: x.reshape(x.shape).relu(),
        lambda self, x: x.view(x.shape[0], x.shape[1], 4).relu(),
        lambda self, x: (x * 1).relu(),
        lambda self, x: (x / 1.0).relu(),
        lambda self, x: nn.functional.dropout(x, 0.5, training=False).relu(),
        lambda self, x: x.to(torch.float32).relu(),
        lambda self, x: x.type_as(x).relu(),
        lambda self, x: torch.cat([x, x[:, :0]], 1).relu(),
        lambda self, x: torch.cat([x]).relu(),
        lambda self, x: torch.cat([x.new_zeros(0), x], 2).relu(),
    ],
)
def test_calls_that_do_nothing_go(body: Any) -> None:
    assert left(body, w=parameter(4)) == ["relu"]


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (lambda self, x: torch.div(x, 1, rounding_mode="floor"), ["div"]),
        (lambda self, x: x.long() / 1, ["to", "div"]),
        (lambda self, x: x[:, :1].expand(-1, 5, 4), ["slice", "expand"]),
        (lambda self, x: x[..., :3], ["slice"]),
        (lambda self, x: x.reshape(x.shape[0], -1), ["sym_size", "reshape"]),
        (lambda self, x: x.to(torch.float64), ["to"]),
        (lambda self, x: x.half().float(), ["to", "to"]),
        (lambda self, x: torch.cat([x, x], 1), ["cat"]),
        (lambda self, x: torch.cat([x[:, :0], x, x, x[..., :0, :]], 1), ["cat"]),
    ],
)
def test_calls_that_do_something_stay(body: Any, kept: list[str]) -> None:
    assert left(body) == kept


def test_equal_calls_are_made_once() -> None:
    assert left(lambda self, x: torch.relu(x) + torch.relu(x) * torch.relu(x)) == ["relu", "mul", "add"]


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x: torch.add(x, x, alpha=2) + torch.add(x, x, alpha=3),
        lambda self, x: torch.where(x > 0, x / 0.0, x / -0.0),
        lambda self, x: torch.full_like(x, True) + torch.full_like(x, 1).add(x),
        lambda self, x: x.sum(1, keepdim=True) + x.sum(1, keepdim=False).sum(),
    ],
    ids=["keyword", "signed-zero", "true-and-one", "flag"],
)
def test_calls_that_differ_a_little_stay_apart(body: Any) -> None:
    left(body)  # verifies the numbers


def test_random_numbers_are_drawn_as_often_as_they_were() -> None:
    program, _ = canonicalized(One(lambda self, x: torch.relu(x) - torch.neg(x)), X)
    rewriter = Rewriter(program, "test")
    for node in program.graph.nodes:
        if op_name(node) in ("relu", "neg"):
            rewriter.update(node, target=torch.ops.aten.rand_like.default, rule="draw")
    clean(program, rewriter)
    rewriter.finish()
    assert float(program(X)[0].abs().max()) > 0


def test_each_size_is_read_once_from_the_first_input_that_has_it() -> None:
    def body(self: Any, x: Tensor, y: Tensor) -> Tensor:
        flat = y.reshape(y.shape[0] * y.shape[1], 4).reshape(y.shape[0], -1)
        return flat + x.reshape(x.shape[0], x.shape[1] * 4)

    program, _ = canonicalized(Two(body), X, X.clone())
    sizes = [node for node in program.graph.nodes if op_name(node) == "sym_size"]
    assert [(node.args[0].target, node.args[1]) for node in sizes] == [("x", 0), ("x", 1)]
    lines = [line.partition(" : ")[2].partition("  #")[0] for line in str(program).splitlines()[1:3]]
    assert lines == ["size B = aten.sym_size.int(%x, 0)", "size T = aten.sym_size.int(%x, 1)"]


def test_known_sizes_become_numbers() -> None:
    program, _ = canonicalized(One(lambda self, x: x.reshape(-1, x.shape[2] // 2)), X)
    assert "aten.reshape(%x, [-1, 2])" in str(program)


def test_views_become_reshapes() -> None:
    assert left(lambda self, x: x.transpose(1, 2).contiguous().view(x.shape[0], -1)) == [
        "sym_size",
        "transpose",
        "reshape",
    ]


def test_an_assignment_to_a_slice_has_a_derivative() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        result = x.clone()
        result[..., 1:] = x[..., :3].sin()
        return result

    assert left(body) == ["slice", "sin", "slice_scatter"]


def test_an_assignment_casts_as_it_did() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        result = x.clone()
        result[..., 1:] = x[..., :3].double().sin()
        return result

    assert left(body) == ["slice", "_to_copy", "sin", "slice", "type_as", "slice_scatter"]
