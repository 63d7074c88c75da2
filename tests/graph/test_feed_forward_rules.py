"""Activation functions are known by what they compute, however they are written."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from skink.graph.blocks import feed_forward_blocks
from skink.graph.capture import capture
from skink.graph.feed_forward_rules import ACTIVATIONS, FACTORED_RULES, RULES
from skink.graph.pipeline import Pipeline
from skink.passes.canonicalize import Canonicalize
from tests.modules import One


def _bloom(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def _cubes_by_products(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def _erf(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


WRITTEN: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("silu", functional.silu),
    ("silu", lambda x: x * torch.sigmoid(x)),
    ("gelu", functional.gelu),
    ("gelu", _erf),
    ("gelu_tanh", lambda x: functional.gelu(x, approximate="tanh")),
    ("gelu_tanh", ACT2FN["gelu_new"]),
    ("gelu_tanh", ACT2FN["gelu_fast"]),
    ("gelu_tanh", ACT2FN["gelu_python_tanh"]),
    ("gelu_tanh", _bloom),
    ("gelu_tanh", _cubes_by_products),
    ("quick_gelu", ACT2FN["quick_gelu"]),
    ("relu", functional.relu),
    ("relu2", ACT2FN["relu2"]),
    ("relu2", lambda x: functional.relu(x) ** 2),
    ("relu2", lambda x: functional.relu(x) * functional.relu(x)),
    ("relu6", functional.relu6),
    ("hardswish", functional.hardswish),
    ("mish", functional.mish),
]


@pytest.mark.parametrize(("name", "function"), WRITTEN, ids=[f"{i}-{name}" for i, (name, _) in enumerate(WRITTEN)])
def test_an_activation_is_known_in_every_form(name: str, function: Callable[[Tensor], Tensor]) -> None:
    module = One(
        lambda m, x: m.out(function(m.into(x)) + function(m.gate(x)) * m.up(x)),
        **{part: nn.Linear(6, 6) for part in ("into", "gate", "up", "out")},
    )
    plain = One(lambda m, x: m.down(function(m.up(x))), up=nn.Linear(6, 8), down=nn.Linear(8, 6))
    gated = One(
        lambda m, x: m.down(m.up(x) * function(m.gate(x))), **{n: nn.Linear(6, 6) for n in ("gate", "up", "down")}
    )
    for candidate, kind in ((plain, "plain"), (gated, "gated"), (module, None)):
        program = capture(candidate, (torch.zeros(2, 5, 6),))
        Pipeline((Canonicalize(),)).run(program, verify=0)
        found = [(block.kind, block.activation) for block in feed_forward_blocks(program)]
        assert found == ([(kind, name)] if kind else [])


def test_another_constant_is_another_function() -> None:
    module = One(lambda m, x: m.down((h := m.up(x)) * torch.sigmoid(1.5 * h)), up=nn.Linear(6, 8), down=nn.Linear(8, 6))
    program = capture(module, (torch.zeros(2, 5, 6),))
    Pipeline((Canonicalize(),)).run(program, verify=0)
    assert feed_forward_blocks(program) == []


def test_every_activation_has_a_rule_for_each_structure() -> None:
    assert set(RULES) == set(FACTORED_RULES)
    assert set(RULES) == {f"{kind}:{name}" for kind in ("plain", "gated", "fused", "sliced") for name in ACTIVATIONS}
