"""Attention on PyTorch's own kernels, against the formula."""

import pytest
import torch

from skink.kernels import ATTENTION
from skink.kernels.attention.torch_impl import attention
from tests.kernels.attention.cases import Case, cases, formula
from tests.kernels.closeness import assert_close

SERVED = [case for case in cases() if not case.softcap and not case.sinks]


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_the_formula(case: Case) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        tensors, options = case.arguments(dtype)
        exact = formula(*(t if t is None or t.dtype is torch.bool else t.double() for t in tensors), **options)
        found = attention(*tensors, **options)
        assert found.dtype is dtype
        assert_close(ATTENTION, found, exact)


def test_strided_inputs() -> None:
    tensors, options = Case(heads=(4, 2), tokens=(5, 9), padding=True).arguments(torch.float32)
    strided = [t if t is None or t.dim() < 4 else t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(attention(*strided, **options), attention(*tensors, **options))
