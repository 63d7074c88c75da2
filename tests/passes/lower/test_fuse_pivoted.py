"""Pivoted layers at lowering: which become one op, with their order or without, and that the numbers stay."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from skink.graph.emit import bind, build_tree
from skink.graph.program import Program
from skink.kernels.cpp.library import library
from skink.passes.lower import Choice, forms, lower
from tests.modules import One, parameter
from tests.programs import canonicalized

X = torch.randn(2, 3, 8)
FACTORS = {"kept": (2, 8), "rest": (4, 2), "kept_bias": (2,), "rest_bias": (4,)}


@pytest.fixture(autouse=True)
def built() -> None:
    if not library().available:
        pytest.skip(library().reason)


def program_of(body: Callable[..., Any], **shapes: tuple[int, ...]) -> Program:
    made: dict[str, Any] = {name: parameter(*shape) for name, shape in (FACTORS | shapes).items()}
    model = One(body, **made)
    for name, values in (("order", [3, 0, 5, 1, 4, 2]), ("first", [3, 0, 5]), ("last", [1, 4, 2])):
        model.register_buffer(name, torch.tensor(values))
    return canonicalized(model, X)[0]


def both(self: Any, x: Tensor, *, bias: bool = True) -> Tensor:
    z = linear(x, self.kept, self.kept_bias if bias else None)
    return torch.cat([z, linear(z, self.rest, self.rest_bias if bias else None)], -1)


def in_order(self: Any, x: Tensor) -> Tensor:
    return both(self, x).index_select(-1, self.order)


def calls(program: Program) -> list[str]:
    """The products of a program, and what moves their results, as printed; columns by whichever function alike."""
    lines = [line.partition(" = ")[2].partition("  # ")[0] for line in str(program).splitlines()]
    lines = [re.sub(r"^index_select\(", "aten.index_select(", line) for line in lines]
    return [line for line in lines if any(name in line for name in ("linear(", "cat(", "index_select("))]


def pivoted(choices: tuple[Choice, ...]) -> list[Choice]:
    return [choice for choice in choices if choice.op == "pivoted_linear"]


WITH_BIASES = "pivoted_linear(%x, @kept, @rest, @kept_bias, @rest_bias"


@pytest.mark.parametrize(
    ("body", "golden"),
    [
        (in_order, [f"{WITH_BIASES}, @order)"]),
        (
            lambda self, x: both(self, x, bias=False).index_select(2, self.order),
            ["pivoted_linear(%x, @kept, @rest, None, None, @order)"],
        ),
        (lambda self, x: torch.relu(both(self, x)), [f"{WITH_BIASES})"]),
        (lambda self, x: torch.relu(both(self, x, bias=False)), ["pivoted_linear(%x, @kept, @rest)"]),
    ],
)
def test_the_layers_become_one_op(body: Any, golden: list[str]) -> None:
    program = program_of(body)
    before = str(program)
    lowered, choices = lower(program)
    [choice] = pivoted(choices)
    assert calls(lowered) == golden
    assert (choice.kernel, choice.refused) == ("cpp", ())
    assert str(program) == before
    torch.testing.assert_close(lowered(X)[0], program(X)[0])
    again, rest = lower(lowered)
    assert str(again) == str(lowered)
    assert not pivoted(rest)


def test_readers_with_orders_of_their_own_share_one_op() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        found = both(self, x)
        return found.index_select(-1, self.first) * found.index_select(-1, self.last)

    program = program_of(body)
    lowered, choices = lower(program)
    op, first, last = calls(lowered)
    assert op == f"{WITH_BIASES})"
    assert first.endswith("-1, @first)")
    assert last.endswith("-1, @last)")
    assert [choice.kernel for choice in pivoted(choices)] == ["cpp"]
    torch.testing.assert_close(lowered(X)[0], program(X)[0])


@pytest.mark.parametrize(
    "index",
    [
        lambda self, found: found.index_select(1, self.tokens),
        lambda self, found: found.index_select(-1, self.order.flip(0)),
    ],
)
def test_an_order_of_another_kind_stays_behind(index: Any) -> None:
    made: dict[str, Any] = {name: parameter(*shape) for name, shape in FACTORS.items()}
    model = One(lambda self, x: index(self, both(self, x)), **made)
    model.register_buffer("tokens", torch.tensor([2, 0]))
    model.register_buffer("order", torch.arange(6))
    program, _ = canonicalized(model, X)
    lowered, _ = lower(program)
    op, behind = calls(lowered)
    assert op == f"{WITH_BIASES})"
    assert "index_select(" in behind
    torch.testing.assert_close(lowered(X)[0], program(X)[0])


@pytest.mark.parametrize(
    "body",
    [
        # One of the two results has another reader.
        lambda self, x: (in_order(self, x), linear(x, self.kept, self.kept_bias)),
        lambda self, x: (in_order(self, x), linear(linear(x, self.kept, self.kept_bias), self.rest, self.rest_bias)),
        # The second layer reads something else, or comes first.
        lambda self, x: torch.cat([linear(x, self.kept), linear(torch.relu(linear(x, self.kept)), self.rest)], -1),
        lambda self, x: torch.cat([linear(linear(x, self.kept), self.rest), linear(x, self.kept)], -1),
        lambda self, x: torch.cat([linear(x, self.kept), linear(linear(x, self.kept), self.square)], 0),
        # A factor is computed, or the rank is none.
        lambda self, x: torch.cat([linear(x, self.kept), linear(linear(x, self.kept), self.rest * 2)], -1),
        lambda self, x: torch.cat([linear(x, self.wide), linear(linear(x, self.wide), self.high)], -1),
    ],
)
def test_near_misses(body: Any) -> None:
    program = program_of(body, square=(2, 2), wide=(8, 8), high=(3, 8))
    lowered, choices = lower(program)
    assert calls(lowered) == calls(program)
    assert not pivoted(choices)


def test_where_no_kernel_serves(set_environment: Callable[..., None]) -> None:
    program = program_of(in_order)
    for options, reason in (
        ({"dtype": torch.float64}, "reads float32, bfloat16 and float16, not float64"),
        ({"device": "cuda"}, "runs on cpu, not on cuda"),
        ({"training": True}, "has no gradient"),
    ):
        lowered, choices = lower(program, **options)  # type: ignore[arg-type]
        [choice] = pivoted(choices)
        assert calls(lowered) == calls(program)
        assert (choice.kernel, choice.refused) == ("products", (("cpp", reason),))
    set_environment(SKINK_KERNELS="reference")
    _, choices = lower(program)
    assert pivoted(choices)[0].refused == (("all", "SKINK_KERNELS=reference"),)


def test_nodes_that_are_asked_for_stay() -> None:
    program = program_of(in_order)
    for part in ("linear", "cat"):
        node = next(node for node in program.graph.nodes if part in node.name)
        lowered, _ = lower(program, keep=[node])
        assert calls(lowered) == calls(program)
    order = next(node for node in program.graph.nodes if "index_select" in node.name)
    op, behind = calls(lower(program, keep=[order])[0])
    assert op == f"{WITH_BIASES})"
    assert "index_select(" in behind


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch, set_environment: Callable[..., None]) -> dict[str, Any]:
    """Times in place of measured ones, in microseconds, and the shapes that were asked for."""
    set_environment(SKINK_BREAK_EVEN="measure")
    found: dict[str, Any] = {"products": 10.0, "fused": 5.0, "dense": 20.0, "asked": []}

    def measured(rows: int, out: int, in_: int, rank: int | None, *_: Any, pivoted: bool = False) -> dict[str, float]:
        found["asked"].append((rows, out, in_, rank, pivoted))
        return {form: found[form] * 1e-6 for form in (("products", "fused") if rank else ("dense",))}

    monkeypatch.setattr(forms, "measured_forms", measured)
    return found


def test_the_quicker_form_is_taken(times: dict[str, Any]) -> None:
    program = program_of(in_order)
    assert calls(lower(program)[0]) == [f"{WITH_BIASES}, @order)"]
    assert times["asked"] == [(1, 6, 8, 2, True)]
    times |= {"products": 4.4}
    lowered, choices = lower(program)
    [choice] = pivoted(choices)
    assert calls(lowered) == calls(program)
    assert choice.refused == (("cpp", "5 µs for one token, two products take 4.4 µs"),)


@pytest.mark.parametrize("body", [in_order, lambda self, x: torch.relu(both(self, x, bias=False))])
def test_multiplied_out_only_where_it_is_allowed_and_quicker(times: dict[str, Any], body: Any) -> None:
    program = program_of(body)
    times |= {"dense": 4.0}
    assert [choice.kernel for choice in pivoted(lower(program)[1])] == ["cpp"]
    lowered, choices = lower(program, dense=True)
    [choice] = pivoted(choices)
    assert [call.partition("(")[0] for call in calls(lowered)] == ["aten.linear"]
    assert choice.refused == (("cpp", "5 µs for one token, the dense layer takes 4 µs"),)
    assert (6, 8) in [tensor.shape for _, tensor in lowered.weights()]
    torch.testing.assert_close(lowered(X)[0], program(X)[0], rtol=1e-4, atol=1e-5)
    shapes = program.with_dtype(torch.float32, shapes_only=True)
    [choice] = pivoted(lower(shapes, dense=True)[1])
    assert (choice.kernel, choice.refused) == ("cpp", (("dense", "the weights' values are not at hand"),))


class Layers(nn.Module):
    """As a pass leaves them: two layers and an order."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.kept, self.rest = nn.Linear(8, 2, bias=bias), nn.Linear(2, 4, bias=bias)
        self.register_buffer("order", torch.tensor([3, 0, 5, 1, 4, 2]))

    def forward(self, x: Tensor) -> Tensor:
        z = self.kept(x)
        return torch.cat([z, self.rest(z)], -1).index_select(-1, self.order)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_is_swapped_is_the_one_that_runs(bias: bool) -> None:
    model = Layers(bias=bias)
    program, _ = canonicalized(model, X)
    lowered, choices = lower(program)
    assert len(pivoted(choices)) == 1
    tree, run = build_tree([program]), bind(lowered)
    with torch.inference_mode():
        torch.testing.assert_close(run(tree, X)[0], model(X))
        for name in ("kept", "rest"):
            layer = tree.get_submodule(name)
            handle = layer.register_forward_hook(lambda layer, given, result: 2 * result)
            other = getattr(model, name).register_forward_hook(lambda layer, given, result: 2 * result)
            torch.testing.assert_close(run(tree, X)[0], model(X))
            handle.remove()
            other.remove()
