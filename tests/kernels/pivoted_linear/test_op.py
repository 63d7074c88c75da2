"""The definition of pivoted_linear: which calls its kernel serves, and what a call costs."""

from typing import Any

import pytest
import torch

from skink.kernels import PIVOTED_LINEAR, OpCall
from skink.kernels.cpp.library import library
from tests.kernels.pivoted_linear.cases import operands

(CPP,) = PIVOTED_LINEAR.variants


def call(*given: Any) -> OpCall:
    return OpCall(PIVOTED_LINEAR.bind(given, {}), torch.device("cpu"))


def test_one_dtype_is_asked_for_and_orders_of_int64() -> None:
    if not library().available:
        pytest.skip(library().reason)
    x, kept, rest, kept_bias, rest_bias, order = operands((2,), 8, 3, 5, torch.float32)
    assert CPP.supports(call(x, kept, rest, kept_bias, rest_bias, order)) is None
    assert CPP.supports(call(x, kept, rest)) is None
    assert CPP.supports(call(x, kept, rest.half())) == "needs rest in the input's dtype, got torch.float16"
    refused = CPP.supports(call(x, kept, rest, None, rest_bias.double()))
    assert refused == "needs rest_bias in the input's dtype, got torch.float64"
    refused = CPP.supports(call(x, kept, rest, None, None, order.int()))
    assert refused == "needs order in int64, got torch.int32"


def test_cost_by_hand() -> None:
    given = operands((2, 3), 8, 3, 5, torch.bfloat16)
    cost = PIVOTED_LINEAR.cost(PIVOTED_LINEAR.bind(given, {}))
    assert cost.macs == 6 * 3 * (8 + 5)
    assert cost.bytes == 2 * (6 * 8 + 3 * 8 + 5 * 3 + 3 + 5 + 6 * 8) + 8 * 8
    given = (*operands((2, 3), 8, 3, 5, torch.bfloat16, bias=False)[:5], torch.tensor([7, 0]))
    cost = PIVOTED_LINEAR.cost(PIVOTED_LINEAR.bind(given, {}))
    assert cost.bytes == 2 * (6 * 8 + 3 * 8 + 5 * 3 + 6 * 2) + 2 * 8
