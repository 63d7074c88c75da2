"""The definition of experts: its kernels, and what it costs."""

import torch

from skink.kernels import EXPERTS, OpCall
from tests.kernels.experts.cases import Case


def test_every_call_is_served() -> None:
    tensors, options = Case().arguments(torch.float32)
    bound = EXPERTS.bind(tensors, options)
    variant, refused = EXPERTS.choose(OpCall(bound, torch.device("cpu")), training=True)
    assert variant is not None
    assert (variant.name, refused) == ("torch", ())
    assert EXPERTS.state is None


def test_cost_is_of_the_experts_that_can_be_used() -> None:
    def cost(tokens: int) -> tuple[int, int]:
        tensors, options = Case(tokens=tokens, experts=8, biases=True).arguments(torch.float32)
        found = EXPERTS.cost(EXPERTS.bind(tensors, options))
        return found.macs, found.bytes

    expert = 4 * (10 * 6 + 6 * 5 + 10 + 6)
    each_macs = 2 * (10 * 6 + 6 * 5)
    each_bytes = 2 * 4 * 6 + 2 * 8 + 2 * 4
    assert cost(1) == (each_macs, 2 * expert + each_bytes)
    assert cost(100) == (100 * each_macs, 8 * expert + 100 * each_bytes)
