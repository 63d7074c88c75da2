"""The reference of low_rank_linear against the formula in float64."""

import pytest
import torch

from skink.kernels import LOW_RANK_LINEAR
from skink.kernels.low_rank_linear.reference import low_rank_linear
from tests.kernels.closeness import assert_close, perturbed
from tests.kernels.low_rank_linear.cases import exact, operands


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_formula(dtype: torch.dtype, lead: tuple[int, ...], bias: bool) -> None:
    given = operands(lead, 63, 5, 17, torch.float64, bias=bias)
    given = tuple(tensor.to(dtype) for tensor in given)
    found, wanted = low_rank_linear(*given), exact(*given)
    assert found.dtype is dtype
    assert_close(LOW_RANK_LINEAR, found, wanted)
    if wanted.numel():
        with pytest.raises(AssertionError, match="off by"):
            assert_close(LOW_RANK_LINEAR, perturbed(LOW_RANK_LINEAR, found), wanted)
