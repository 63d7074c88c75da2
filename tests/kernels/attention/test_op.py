"""The definition of attention: what kernels refuse, and its state."""

import pytest
import torch

from skink.kernels import ATTENTION, OpCall
from tests.kernels.attention.cases import Case


def refusal(name: str, case: Case) -> str | None:
    tensors, options = case.arguments(torch.float32)
    (variant,) = [variant for variant in ATTENTION.variants if variant.name == name]
    return variant.supports(OpCall(ATTENTION.bind(tensors, options), torch.device("cpu")))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(), None),
        (Case(padding=True, window=3), None),
        (Case(softcap=2.0), "has no soft cap"),
        (Case(sinks=True), "has no sinks"),
        (Case(alibi=True), None),
    ],
)
def test_what_pytorchs_kernels_refuse(case: Case, reason: str | None) -> None:
    assert refusal("torch", case) == reason


def test_kernels_in_order_of_preference() -> None:
    assert [(variant.name, variant.differentiable) for variant in ATTENTION.variants] == [
        ("cpp", False),
        ("torch", True),
    ]


def state(**options: object) -> list[tuple[str, str, str, int]]:
    bound = ATTENTION.bind((None, None, None), {"scale": 1.0, **options})
    assert ATTENTION.state is not None
    return [(t.name, t.argument, t.growth, t.limit) for t in ATTENTION.state.tensors(bound)]


def test_state() -> None:
    assert state() == [("key", "key", "append", 0), ("value", "value", "append", 0)]
    assert state(window=5) == [("key", "key", "ring", 4), ("value", "value", "ring", 4)]
    assert state(window=1) == [("key", "key", "ring", 0), ("value", "value", "ring", 0)]


def test_only_causal_attention_can_be_stepped() -> None:
    assert ATTENTION.state is not None
    assert ATTENTION.state.refuses(ATTENTION.bind((None, None, None), {"scale": 1.0})) is None
    reason = ATTENTION.state.refuses(ATTENTION.bind((None, None, None), {"scale": 1.0, "causal": False}))
    assert reason is not None
    assert "is not causal" in reason
