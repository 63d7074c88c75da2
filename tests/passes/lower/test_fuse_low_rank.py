"""Pairs of thin layers at lowering: which become one op, how that is decided, and that the numbers stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from skink.graph.program import Program
from skink.kernels.cpp.library import library
from skink.passes.lower import Choice, lower
from skink.passes.lower import forms as module
from tests.modules import One, Two, parameter
from tests.programs import canonicalized

X = torch.randn(2, 3, 8)
FACTORS = {"down": (2, 8), "up": (6, 2), "bias": (6,)}


@pytest.fixture(autouse=True)
def built() -> None:
    if not library().available:
        pytest.skip(library().reason)


def program_of(body: Callable[..., Any], *examples: Tensor, **shapes: tuple[int, ...]) -> Program:
    kind = One if len(examples) == 1 else Two
    made = {name: parameter(*shape) for name, shape in (FACTORS | shapes).items()}
    return canonicalized(kind(body, **made), *examples)[0]


def with_bias(self: Any, x: Tensor) -> Tensor:
    return linear(linear(x, self.down), self.up, self.bias)


def layers(program: Program) -> list[str]:
    """The products of a program, as printed."""
    lines = [line.partition(" = ")[2].partition("  # ")[0] for line in str(program).splitlines()]
    return [line for line in lines if "linear(" in line]


def low_rank(choices: tuple[Choice, ...]) -> list[Choice]:
    return [choice for choice in choices if choice.op == "low_rank_linear"]


@pytest.mark.parametrize(
    ("body", "golden"),
    [
        (with_bias, ["low_rank_linear(%x, @down, @up, @bias)"]),
        (lambda self, x: linear(linear(x, self.down), self.up), ["low_rank_linear(%x, @down, @up)"]),
    ],
)
def test_a_pair_becomes_one_op(body: Any, golden: list[str]) -> None:
    program = program_of(body, X)
    before = str(program)
    lowered, choices = lower(program)
    [choice] = low_rank(choices)
    assert layers(lowered) == golden
    assert (choice.kernel, choice.refused) == ("cpp", ())
    assert str(program) == before
    torch.testing.assert_close(lowered(X)[0], program(X)[0])
    again, rest = lower(lowered)
    assert str(again) == str(lowered)
    assert not low_rank(rest)


def test_every_pair_of_a_model() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        return linear(linear(torch.relu(with_bias(self, x)), self.down2), self.up2)

    program = program_of(body, X, down2=(1, 6), up2=(5, 1))
    lowered, choices = lower(program)
    assert layers(lowered) == [
        "low_rank_linear(%x, @down, @up, @bias)",
        "low_rank_linear(%relu, @down2, @up2)",
    ]
    assert len(low_rank(choices)) == 2
    torch.testing.assert_close(lowered(X)[0], program(X)[0])


@pytest.mark.parametrize(
    "body",
    [
        # The inner vector has another reader: a layer that shares its input basis with others.
        lambda self, x: with_bias(self, x) + linear(linear(x, self.down), self.up).sum(),
        lambda self, x: (with_bias(self, x), linear(x, self.down)),
        lambda self, x: linear(linear(x, self.down, self.inner), self.up, self.bias),
        lambda self, x: linear(torch.relu(linear(x, self.down)), self.up, self.bias),
        lambda self, x: linear(linear(x, self.down), self.up * 2, self.bias),
        lambda self, x: linear(linear(x, self.wide), self.high, self.bias),
    ],
)
def test_near_misses(body: Any) -> None:
    program = program_of(body, X, inner=(2,), wide=(6, 8), high=(6, 6))
    lowered, choices = lower(program)
    assert layers(lowered) == layers(program)
    assert not low_rank(choices)


def test_two_dtypes_stay_two_layers() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        return linear(linear(x, self.down).double(), self.up.double()).float()

    program = program_of(body, X)
    lowered, choices = lower(program)
    assert layers(lowered) == layers(program)
    assert not low_rank(choices)


def test_gradients_keep_two_layers() -> None:
    program = program_of(with_bias, X)
    lowered, choices = lower(program, training=True)
    [choice] = low_rank(choices)
    assert layers(lowered) == layers(program)
    assert choice.kernel == "products"
    assert dict(choice.refused)["cpp"] == "has no gradient"


def test_where_no_kernel_serves(set_environment: Callable[..., None]) -> None:
    program = program_of(with_bias, X)
    for options, reason in (
        ({"dtype": torch.float64}, "reads float32, bfloat16 and float16, not float64"),
        ({"device": "cuda"}, "runs on cpu, not on cuda"),
    ):
        lowered, choices = lower(program, **options)
        [choice] = low_rank(choices)
        assert dict(choice.refused)["cpp"] == reason
        # With Triton at hand, a GPU has a kernel of its own.
        assert choice.kernel in ("products", "triton")
        assert (layers(lowered) == layers(program)) == (choice.kernel == "products")
    set_environment(SKINK_KERNELS="reference")
    lowered, choices = lower(program)
    assert layers(lowered) == layers(program)
    assert low_rank(choices)[0].refused == (("all", "SKINK_KERNELS=reference"),)


def test_nodes_that_are_asked_for_stay() -> None:
    program = program_of(with_bias, X)
    inner = next(node for node in program.graph.nodes if "linear" in node.name)
    lowered, _ = lower(program, keep=[inner])
    assert layers(lowered) == layers(program)
    assert inner.name in [node.name for node in lowered.graph.nodes]


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch, set_environment: Callable[..., None]) -> dict[str, Any]:
    """Times in place of measured ones, in microseconds, and the shapes that were asked for."""
    set_environment(SKINK_BREAK_EVEN="measure")
    found: dict[str, Any] = {"products": 10.0, "fused": 5.0, "dense": 20.0, "asked": []}

    def measured(rows: int, out: int, in_: int, rank: int | None, *_: Any, **__: Any) -> dict[str, float]:
        found["asked"].append((rows, out, in_, rank))
        return {form: found[form] * 1e-6 for form in (("products", "fused") if rank else ("dense",))}

    monkeypatch.setattr(module, "measured_forms", measured)
    return found


def test_the_quicker_form_is_taken(times: dict[str, Any]) -> None:
    program = program_of(with_bias, X)
    lowered, choices = lower(program)
    assert layers(lowered) == ["low_rank_linear(%x, @down, @up, @bias)"]
    assert times["asked"] == [(1, 6, 8, 2)]
    times |= {"products": 4.6}  # within what measuring is uncertain by
    assert low_rank(lower(program)[1])[0].kernel == "cpp"
    times |= {"products": 4.4}
    lowered, choices = lower(program)
    [choice] = low_rank(choices)
    assert layers(lowered) == layers(program)
    assert choice.kernel == "products"
    assert choice.refused == (("cpp", "5 µs for one token, two products take 4.4 µs"),)
    assert "linear" in choice.node


def test_multiplied_out_only_where_it_is_allowed_and_quicker(times: dict[str, Any]) -> None:
    program = program_of(with_bias, X)
    times |= {"dense": 4.0}
    assert low_rank(lower(program)[1])[0].kernel == "cpp"
    lowered, choices = lower(program, dense=True)
    [choice] = low_rank(choices)
    assert layers(lowered) == ["aten.linear(%x, @up_times_down, @bias)"]
    assert choice.kernel == "dense"
    assert choice.refused == (("cpp", "5 µs for one token, the dense layer takes 4 µs"),)
    assert set(dict(lowered.weights())) == {"up_times_down", "bias"}
    weights = dict(program.weights())
    torch.testing.assert_close(lowered.weight("up_times_down"), weights["up"] @ weights["down"])
    torch.testing.assert_close(lowered(X)[0], program(X)[0], rtol=1e-4, atol=1e-5)
    times |= {"dense": 4.6}
    [choice] = low_rank(lower(program, dense=True)[1])
    assert (choice.kernel, choice.refused) == ("cpp", (("dense", "4.6 µs for one token, fused takes 5 µs"),))
    times |= {"dense": 1.0}
    [choice] = low_rank(lower(program.with_dtype(torch.float32, shapes_only=True), dense=True)[1])
    assert (choice.kernel, choice.refused) == ("cpp", (("dense", "the weights' values are not at hand"),))


def test_without_pairs_nothing_is_measured(times: dict[str, Any]) -> None:
    program, _ = canonicalized(nn.Linear(8, 6), X)
    lower(program)
    assert times["asked"] == []
