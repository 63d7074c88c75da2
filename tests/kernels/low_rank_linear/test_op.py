"""The definition of low_rank_linear: which kernels serve which calls, and what a call costs."""

from typing import Any

import pytest
import torch

from skink.kernels import LOW_RANK_LINEAR, OpCall
from skink.kernels.cpp.library import library
from tests.kernels.low_rank_linear.cases import operands

CPP, TRITON = LOW_RANK_LINEAR.variants


def call(*given: Any, device: str = "cpu") -> OpCall:
    return OpCall(LOW_RANK_LINEAR.bind(given, {}), torch.device(device))


def test_one_dtype_is_asked_for() -> None:
    if not library().available:
        pytest.skip(library().reason)
    x, down, up, bias = operands((2,), 8, 3, 5, torch.float32)
    assert CPP.supports(call(x, down, up, bias)) is None
    assert CPP.supports(call(x, down, up)) is None
    assert CPP.supports(call(x, down, up.half())) == "needs up in the input's dtype, got torch.float16"
    assert CPP.supports(call(x, down, up, bias.double())) == "needs bias in the input's dtype, got torch.float64"


def test_what_the_gpu_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands((2,), 8, 3, 5, torch.float32)
    assert TRITON.supports(call(*given)) == "runs on cuda, not on cpu"
    wide = [tensor.double() for tensor in given]
    assert TRITON.supports(call(*wide, device="cuda")) == "reads float32, bfloat16 and float16, not float64"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert TRITON.supports(call(*given, device="cuda")) == "triton is not installed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert TRITON.supports(call(*given, device="cuda")) is None
    mixed = (given[0], given[1].half(), *given[2:])
    assert TRITON.supports(call(*mixed, device="cuda")) == "needs down in the input's dtype, got torch.float16"


def test_cost_by_hand() -> None:
    given = operands((2, 3), 8, 3, 5, torch.bfloat16)
    cost = LOW_RANK_LINEAR.cost(LOW_RANK_LINEAR.bind(given, {}))
    assert cost.macs == 6 * 3 * (8 + 5)
    assert cost.bytes == 2 * (6 * 8 + 3 * 8 + 5 * 3 + 5 + 6 * 5)
