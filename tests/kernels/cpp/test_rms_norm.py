"""`skink_cpp::rms_norm` against the formula in float64."""

import pytest
import torch
from torch import Tensor

from tests.kernels.cpp.closeness import assert_right, perturbed


def expected(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    wide = x.double()
    normal = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return normal if weight is None else normal * (offset + weight.double())


@pytest.mark.parametrize("width", [1, 3, 16, 63, 64, 65, 127, 512, 1021])
def test_rows_of_any_width(instruction_set: str, dtype: torch.dtype, width: int) -> None:
    x, weight = torch.randn(2, 5, width).to(dtype), torch.randn(width).to(dtype)
    actual = torch.ops.skink_cpp.rms_norm(x, weight, 1e-5)
    assert actual.dtype == dtype
    assert_right(actual, expected(x, weight, 1e-5, 0.0))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_offset_and_weight_dtype(instruction_set: str, dtype: torch.dtype, offset: float) -> None:
    x, weight = torch.randn(7, 65).to(dtype), torch.randn(65)
    assert_right(torch.ops.skink_cpp.rms_norm(x, weight, 1e-6, offset), expected(x, weight, 1e-6, offset))


def test_without_weight(instruction_set: str, dtype: torch.dtype) -> None:
    x = torch.randn(7, 65).to(dtype)
    assert_right(torch.ops.skink_cpp.rms_norm(x, None, 1e-6, 1.0), expected(x, None, 1e-6, 1.0))


def test_many_rows_on_threads(instruction_set: str, threads: int) -> None:
    x, weight = torch.randn(1009, 67), torch.randn(67)
    assert_right(torch.ops.skink_cpp.rms_norm(x, weight, 1e-6), expected(x, weight, 1e-6, 0.0))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :33],
        lambda x: x[::2],
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x.view(4, 10, 66).transpose(0, 1),
        lambda x: x[:, 1:2],
        lambda x: x[:1].expand(9, 66),
    ],
)
def test_views(instruction_set: str, dtype: torch.dtype, view: object) -> None:
    x = view(torch.randn(40, 66).to(dtype))
    actual = torch.ops.skink_cpp.rms_norm(x, None, 1e-6)
    assert actual.is_contiguous()
    assert_right(actual, expected(x, None, 1e-6, 0.0))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_empty(built: None, shape: tuple[int, ...]) -> None:
    assert torch.ops.skink_cpp.rms_norm(torch.ones(shape), torch.ones(shape[-1]), 1e-6).shape == shape


def test_extreme_values(instruction_set: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [1e-7, -1e-7, 0.0], [60000.0, -60000.0, 1.0]]).to(dtype)
    assert_right(torch.ops.skink_cpp.rms_norm(x, None, 1e-6), expected(x, None, 1e-6, 0.0))
    broken = torch.tensor([[1.0, float("nan")]]).to(dtype)
    assert torch.ops.skink_cpp.rms_norm(broken, None, 1e-6).isnan().all()


def test_the_check_sees_a_wrong_element(instruction_set: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 65).to(dtype)
    actual = torch.ops.skink_cpp.rms_norm(x, None, 1e-6)
    with pytest.raises(AssertionError, match="off by"):
        assert_right(actual, perturbed(expected(x, None, 1e-6, 0.0), dtype))


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(2, 4), torch.ones(3), r"weight must be \[4\], got \[3\]"),
        (torch.ones(2, 4), torch.ones(1, 4), r"weight must be \[4\], got \[1, 4\]"),
        (torch.ones(2, 4, dtype=torch.float64), None, "dtype must be float32, bfloat16 or float16, got Double"),
        (torch.ones(2, 4), torch.ones(4, dtype=torch.bfloat16), "weight must be of the input's dtype or float32"),
        (torch.ones(()), None, "at least one dimension"),
    ],
)
def test_wrong_arguments(built: None, x: Tensor, weight: Tensor | None, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.skink_cpp.rms_norm(x, weight, 1e-6)


def test_traces(built: None, dtype: torch.dtype) -> None:
    torch.library.opcheck(
        torch.ops.skink_cpp.rms_norm.default,
        (torch.randn(3, 4, 8).to(dtype), torch.randn(8).to(dtype), 1e-6),
        test_utils=("test_schema", "test_faketensor"),
    )
