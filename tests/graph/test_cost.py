"""What a program costs, against counts by hand."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from skink.graph.capture import capture
from skink.graph.cost import program_cost
from tests.graph.test_state_law import decoder
from tests.models import tiny
from tests.modules import One, Two
from tests.programs import canonical

# One layer of the tiny Llama: width 64, 4 heads and 2 key heads of 16, inner width 128; 97 words; 2 layers.
LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
WORDS = 97 * 64


def test_a_decoder() -> None:
    cost = program_cost(canonical("llama"), context=100)
    assert cost.parameters == sum(p.numel() for p in tiny("llama").parameters())
    assert cost.bytes == 4 * cost.parameters
    assert cost.linear_parameters == cost.linear_macs_per_token == 2 * LAYER
    assert cost.linear_bytes == 4 * cost.linear_parameters
    attention = 2 * 4 * 100 * (16 + 16)
    assert cost.macs_per_token == 2 * LAYER + WORDS + attention
    assert cost.context == 100


def test_tied_weights_count_once_and_are_no_linear_layer_of_their_own() -> None:
    cost = program_cost(canonical("gpt2"), context=0)
    blocks = 2 * (64 * 192 + 64 * 64 + 2 * 64 * 256)
    assert cost.parameters == sum(p.numel() for p in tiny("gpt2").parameters())
    assert cost.linear_parameters == cost.linear_macs_per_token == blocks
    assert cost.macs_per_token == blocks + WORDS


def test_windows_bound_the_keys() -> None:
    full, _ = decoder((0, 5), 0.0, False)  # 4 query heads of 2 features, without a window and with one
    work = [program_cost(full, context=context).macs_per_token for context in (3, 5, 100, 1000)]
    assert [after - before for before, after in pairwise(work)] == [2 * 4 * 2 * 4, 95 * 4 * 4, 900 * 4 * 4]


def test_only_chosen_experts_cost_anything() -> None:
    cost = program_cost(canonical("mixtral"), context=0)
    experts = 3 * 64 * 128
    layer = LAYER - experts + 4 * 64  # attention and the router
    assert cost.macs_per_token == 2 * (layer + 2 * experts) + WORDS
    assert cost.parameters > 2 * (layer + 4 * experts)


def test_products_that_are_not_linear_layers() -> None:
    two = Two(lambda self, x, y: x @ y)
    program = capture(two, (torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)), dims={"x": {0: "B", 1: "T"}, "y": {0: "B"}})
    assert program_cost(program).macs_per_token == 4 * 5
    added = One(lambda self, x: torch.addmm(self.b, x, self.w), b=torch.zeros(6), w=torch.zeros(4, 6))
    assert program_cost(capture(added, (torch.zeros(2, 4),))).macs_per_token == 4 * 6


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_values_are_not_needed(device: str) -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4, bias=False)).to(torch.bfloat16).to(device)
    cost = program_cost(capture(module, (torch.zeros(2, 4, dtype=torch.bfloat16),)))
    assert (cost.parameters, cost.bytes, cost.macs_per_token) == (4 * 6 + 6 + 6 * 4, 108, 48)
