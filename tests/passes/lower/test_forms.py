"""The form of a factored layer: what is measured for it. What becomes of it, test_fuse_low_rank.py and others say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from skink.kernels import LOW_RANK_LINEAR, PIVOTED_LINEAR
from skink.kernels.cpp.library import library
from skink.passes.lower import forms
from skink.passes.lower.forms import Decision, Target, choose_form, is_linear, rounded
from tests.modules import One, parameter
from tests.programs import canonicalized

CPU = torch.device("cpu")


def body(self: Any, x: Tensor) -> Tensor:
    return linear(linear(x, self.down), self.up)


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch, set_environment: Callable[..., None]) -> Callable[..., tuple[Any, ...]]:
    """Chooses for factors [5, 8] and [4, 5]; gives the decision and what was measured for it."""
    if not library().available:
        pytest.skip(library().reason)
    set_environment(SKINK_BREAK_EVEN="measure")
    asked: list[Any] = []
    program, _ = canonicalized(One(body, down=parameter(5, 8), up=parameter(4, 5)), torch.randn(2, 8))
    down, up = (node for node in program.graph.nodes if node.op == "get_attr")

    def measured(*call: Any, pivoted: bool) -> dict[str, float]:
        asked.append((*call, pivoted))
        return {"products": 2e-6, "fused": 1e-6}

    def choose(pivoted: bool, **target: Any) -> tuple[Any, ...]:
        op, names = (PIVOTED_LINEAR, ("kept", "rest")) if pivoted else (LOW_RANK_LINEAR, ("down", "up"))
        factors: dict[str, Any] = dict.fromkeys(argument.name for argument in op.overload._schema.arguments[1:])
        factors |= dict(zip(names, (down, up)))
        goal = Target(target.pop("device", CPU), **target)
        return choose_form("here", op, factors, program, goal, pivoted=pivoted), asked

    monkeypatch.setattr(forms, "measured_forms", measured)
    return choose


def test_one_token_is_measured_at_the_layers_own_shape(choose: Callable[..., tuple[Any, ...]]) -> None:
    decision, asked = choose(False)
    assert decision == Decision("here", "low_rank_linear", "fused", ())
    assert asked == [(1, 4, 8, 5, torch.float32, CPU, False)]
    decision, asked = choose(True, dtype=torch.bfloat16)
    assert decision == Decision("here", "pivoted_linear", "fused", ())
    # The results of the first factor are outputs as well.
    assert asked[1:] == [(1, 9, 8, 5, torch.bfloat16, CPU, True)]


def test_nothing_is_measured_where_no_kernel_serves(choose: Callable[..., tuple[Any, ...]]) -> None:
    decision, asked = choose(True, training=True)
    assert decision == Decision("here", "pivoted_linear", "products", (("cpp", "has no gradient"),))
    decision, asked = choose(True, dtype=torch.float64)
    assert decision.form == "products"
    assert asked == []


def test_nothing_is_measured_when_that_is_off(
    choose: Callable[..., tuple[Any, ...]], set_environment: Callable[..., None]
) -> None:
    set_environment(SKINK_BREAK_EVEN="off")
    decision, asked = choose(True)
    assert decision.form == "fused"
    assert asked == []


def test_ranks_are_measured_in_steps() -> None:
    for rank, measured in ((1, 1), (7, 7), (15, 15), (17, 18), (33, 36), (100, 104), (1492, 1536)):
        assert rounded(rank) == measured
        assert measured < rank * 1.13


def test_what_is_a_linear_layer() -> None:
    program, _ = canonicalized(One(body, down=parameter(5, 8), up=parameter(4, 5)), torch.randn(2, 8))
    assert [node.name for node in program.graph.nodes if is_linear(node)] == ["linear", "linear_1"]
    assert not is_linear(3)
