"""The reference of rms_norm, against the formula in float64 and PyTorch's own."""

import math

import pytest
import torch

from skink.kernels import RMS_NORM
from skink.kernels.rms_norm.reference import rms_norm
from tests.kernels.closeness import assert_close, perturbed

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 65), (0, 4)])
@pytest.mark.parametrize(("weighted", "offset"), [(True, 0.0), (True, 1.0), (False, 0.0)])
def test_the_formula(dtype: torch.dtype, shape: tuple[int, ...], weighted: bool, offset: float) -> None:
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    weight = torch.randn(shape[-1], dtype=torch.float64).to(dtype) if weighted else None
    found = rms_norm(x, weight, 1e-3, offset)
    assert found.dtype is dtype
    rows = []
    for row in x.double().reshape(-1, shape[-1]).tolist():
        root = math.sqrt(sum(value * value for value in row) / len(row) + 1e-3)
        factors = [offset + float(w) for w in weight] if weight is not None else [1.0] * len(row)
        rows.append([value / root * factor for value, factor in zip(row, factors, strict=True)])
    exact = torch.tensor(rows, dtype=torch.float64).reshape(shape)
    assert_close(RMS_NORM, found, exact)
    if exact.numel():
        with pytest.raises(AssertionError, match="off by"):
            assert_close(RMS_NORM, perturbed(RMS_NORM, found), exact)


def test_pytorchs_own() -> None:
    x, weight = torch.randn(2, 5, 16), torch.randn(16)
    wanted = torch.nn.functional.rms_norm(x, [16], weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), wanted)


def test_squares_do_not_overflow_in_half_precision() -> None:
    x = torch.full((1, 4), 1000.0, dtype=torch.float16)
    torch.testing.assert_close(rms_norm(x, None, 1e-6), torch.ones(1, 4, dtype=torch.float16))
