"""Why an activation is in no feed-forward block."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skink.graph.blocks import feed_forward_blocks
from skink.graph.capture import capture
from skink.graph.loose_activations import loose_activations
from skink.graph.pipeline import Pipeline
from skink.passes.canonicalize import Canonicalize
from tests.graph.programs import canonical
from tests.modules import One


def test_every_activation_of_a_decoder_is_in_a_block() -> None:
    for family in ("llama", "gpt2", "phi3", "opt", "mixtral"):
        program = canonical(family)
        assert loose_activations(program, feed_forward_blocks(program)) == []


def test_an_activation_that_no_product_reads_says_so() -> None:
    program = canonical("gemma2")
    (loose,) = loose_activations(program, feed_forward_blocks(program))
    assert loose.node.target is torch.ops.aten.tanh.default  # the cap on the logits
    assert loose.reason == "no linear layer reads it"


def _loose(body: Any, **parts: nn.Module) -> list[str]:
    program = capture(One(body, **parts), (torch.zeros(2, 5, 6),))
    Pipeline((Canonicalize(),)).run(program, verify=0)
    blocks = feed_forward_blocks(program)
    assert blocks == []
    return [entry.reason for entry in loose_activations(program, blocks)]


def test_near_misses_say_where_they_differ() -> None:
    linear = nn.Linear
    two = {"up": linear(6, 8), "down": linear(8, 6)}
    assert _loose(lambda m, x: m.down(functional.softplus(m.up(x))), **two)[0].endswith("found softplus")
    assert _loose(lambda m, x: m.down(functional.relu(m.up(x)) * 2.0), **two) == ["relu expected, found 2.0, at %mul"]
    (reason,) = _loose(lambda m, x: m.down(functional.silu(m.gate(x)) * m.up(x + 1.0)), gate=linear(6, 8), **two)
    assert reason == "x is used twice, for two different values, at %linear_1"


def test_what_bars_the_way_to_a_product_is_named() -> None:
    norm = {"norm": nn.LayerNorm(8), "up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}
    (reason,) = _loose(lambda m, x: m.down(m.norm(functional.relu(m.up(x)))), **norm)
    assert reason == "no linear layer reads it, but layer_norm"


def test_halves_that_overlap_are_none() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        both = m.both(x)
        result: Tensor = m.down(functional.silu(both[..., :8]) * both[..., 4:12])
        return result

    (reason,) = _loose(body, both=nn.Linear(6, 16), down=nn.Linear(8, 6))
    assert reason == "gate and up are not the two halves of one product"
