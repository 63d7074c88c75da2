"""pivoted_linear on the CPU: the same numbers on both sides of the switch to PyTorch's products."""

import pytest
import torch

from skink.kernels import PIVOTED_LINEAR
from skink.kernels.cpp.library import library
from tests.kernels.closeness import assert_close
from tests.kernels.pivoted_linear.cases import exact, operands

if library().available:
    from skink.kernels.pivoted_linear import cpu
else:
    pytest.skip(library().reason, allow_module_level=True)


@pytest.mark.parametrize("dtype", cpu.FEW_ROWS)
@pytest.mark.parametrize(("bias", "order"), [(True, True), (False, False)])
def test_few_rows_and_many(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool, order: bool) -> None:
    few = cpu.FEW_ROWS[dtype]
    calls = []
    monkeypatch.setattr(cpu, "two_products", lambda *given: calls.append(given) or PIVOTED_LINEAR.reference(*given))
    for lead in ((few,), (1, few), (few + 1,), (2, few)):
        given = operands(lead, 65, 7, 26, dtype, bias=bias, order=order)
        assert_close(PIVOTED_LINEAR, cpu.pivoted_linear(*given), exact(*given))
    assert [given[0].shape[:-1] for given in calls] == [(few + 1,), (2, few)]
