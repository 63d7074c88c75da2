"""The reference of pivoted_linear against the formula in float64."""

import pytest
import torch

from skink.kernels import PIVOTED_LINEAR
from skink.kernels.pivoted_linear.reference import pivoted_linear
from tests.kernels.closeness import assert_close, perturbed
from tests.kernels.pivoted_linear.cases import exact, operands


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0, 4)])
@pytest.mark.parametrize(("bias", "order"), [(True, True), (False, True), (True, False), (False, False)])
def test_the_formula(dtype: torch.dtype, lead: tuple[int, ...], bias: bool, order: bool) -> None:
    given = operands(lead, 63, 5, 12, dtype, bias=bias, order=order)
    found, wanted = pivoted_linear(*given), exact(*given)
    assert found.dtype is dtype
    if not wanted.numel():
        assert found.shape == (*lead, 17)
        return
    assert_close(PIVOTED_LINEAR, found, wanted)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(PIVOTED_LINEAR, perturbed(PIVOTED_LINEAR, found), wanted)
