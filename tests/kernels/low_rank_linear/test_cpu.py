"""low_rank_linear on the CPU: the same numbers on both sides of the switch to PyTorch's products."""

import pytest
import torch

from skink.kernels import LOW_RANK_LINEAR
from skink.kernels.cpp.library import library
from tests.kernels.closeness import assert_close
from tests.kernels.low_rank_linear.cases import exact, operands

if library().available:
    from skink.kernels.low_rank_linear import cpu
else:
    pytest.skip(library().reason, allow_module_level=True)


@pytest.mark.parametrize("dtype", cpu.FEW_ROWS)
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_and_many(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool) -> None:
    few = cpu.FEW_ROWS[dtype]
    calls = []
    monkeypatch.setattr(cpu, "two_products", lambda *given: calls.append(given) or LOW_RANK_LINEAR.reference(*given))
    for lead in ((few,), (1, few), (few + 1,), (2, few)):
        given = operands(lead, 65, 7, 33, dtype, bias=bias)
        found = cpu.low_rank_linear(*given)
        assert_close(LOW_RANK_LINEAR, found, exact(*given))
    assert [given[0].shape[:-1] for given in calls] == [(few + 1,), (2, few)]


def test_empty() -> None:
    x, down, up, bias = operands((0,), 6, 2, 4, torch.float32)
    assert cpu.low_rank_linear(x, down, up, bias).shape == (0, 4)
    x, down, up, bias = operands((3,), 0, 2, 4, torch.float32)
    assert torch.equal(cpu.low_rank_linear(x, down, up, bias), bias.expand(3, 4))
