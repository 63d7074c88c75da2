"""`skink_cpp::rotary` against the rotation written as complex numbers in float64."""

import pytest
import torch
from torch import Tensor

from tests.kernels.cpp.closeness import assert_right, perturbed


def tables(batch: int, tokens: int, width: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Random angles, one for each pair of features, laid out as the op takes them."""
    angle = torch.rand(batch, tokens, width // 2) * 6.28
    angle = angle.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def expected(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = cos.shape[-1]
    half = width // 2
    turned = x[..., :width].double()
    cos, sin = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    result = torch.empty_like(turned)
    result[..., first] = turned[..., first] * cos[..., first] - turned[..., second] * sin[..., first]
    result[..., second] = turned[..., second] * cos[..., second] + turned[..., first] * sin[..., second]
    return torch.cat((result, x[..., width:].double()), dim=-1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("width", "rotated"), [(2, 2), (16, 16), (64, 64), (65, 62), (80, 32), (96, 96), (37, 34), (8, 0)]
)
def test_any_width(instruction_set: str, dtype: torch.dtype, width: int, rotated: int, interleaved: bool) -> None:
    x = torch.randn(2, 3, 5, width).to(dtype)
    cos, sin = (table.to(dtype) for table in tables(2, 5, rotated, interleaved))
    actual = torch.ops.skink_cpp.rotary(x, cos, sin, interleaved)
    assert actual.dtype == dtype
    assert_right(actual, expected(x, cos, sin, interleaved))


def test_different_tables_for_the_two_of_a_pair(instruction_set: str, dtype: torch.dtype) -> None:
    x, cos, sin = torch.randn(1, 2, 3, 70).to(dtype), torch.randn(1, 3, 70).to(dtype), torch.randn(1, 3, 70).to(dtype)
    for interleaved in (False, True):
        actual = torch.ops.skink_cpp.rotary(x, cos, sin, interleaved)
        assert_right(actual, expected(x, cos, sin, interleaved))


def test_one_table_for_the_whole_batch(instruction_set: str, threads: int) -> None:
    x = torch.randn(5, 7, 101, 66)
    cos, sin = tables(1, 101, 66, False)
    assert_right(torch.ops.skink_cpp.rotary(x, cos, sin), expected(x, cos, sin, False))


def test_tables_take_the_dtype_of_the_input(built: None, dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 3, 16).to(dtype)
    cos, sin = tables(1, 3, 16, False)
    assert_right(torch.ops.skink_cpp.rotary(x, cos, sin), expected(x, cos.to(dtype), sin.to(dtype), False))


@pytest.mark.parametrize(
    "view", [lambda x: x.transpose(1, 2), lambda x: x[:, ::2], lambda x: x.flip(0).transpose(2, 3)]
)
def test_views(instruction_set: str, dtype: torch.dtype, view: object) -> None:
    x = view(torch.randn(2, 6, 6, 6).to(dtype))
    cos, sin = tables(2, 12, 6, False)
    cos, sin = cos[:, ::2].to(dtype)[:, : x.shape[2]], sin[:, 1::2].to(dtype)[:, : x.shape[2]]
    actual = torch.ops.skink_cpp.rotary(x, cos, sin)
    assert actual.is_contiguous()
    assert_right(actual, expected(x, cos, sin, False))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4)])
def test_empty(built: None, shape: tuple[int, ...]) -> None:
    cos, sin = tables(1, shape[2], 4, False)
    assert torch.ops.skink_cpp.rotary(torch.ones(shape), cos, sin).shape == shape


def test_the_check_sees_a_wrong_element(instruction_set: str, dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 3, 16).to(dtype)
    cos, sin = (table.to(dtype) for table in tables(1, 3, 16, False))
    with pytest.raises(AssertionError, match="off by"):
        assert_right(torch.ops.skink_cpp.rotary(x, cos, sin), perturbed(expected(x, cos, sin, False), dtype))


@pytest.mark.parametrize(
    ("x", "table", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(1, 3, 4), r"input must be \[B, H, T, D\], got \[2, 3, 4\]"),
        (torch.ones(2, 1, 3, 4), torch.ones(3, 3, 4), r"cos must be \[B or 1, T, R\]"),
        (torch.ones(2, 1, 3, 4), torch.ones(1, 2, 4), r"cos must be \[B or 1, T, R\]"),
        (torch.ones(2, 1, 3, 4), torch.ones(1, 3, 3), "R even and at most D"),
        (torch.ones(2, 1, 3, 4), torch.ones(1, 3, 6), "R even and at most D"),
        (torch.ones(2, 1, 3, 4, dtype=torch.float64), torch.ones(1, 3, 4), "dtype must be float32"),
    ],
)
def test_wrong_arguments(built: None, x: Tensor, table: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.skink_cpp.rotary(x, table, table)


def test_wrong_sine(built: None) -> None:
    with pytest.raises(RuntimeError, match="cos and sin must have one width"):
        torch.ops.skink_cpp.rotary(torch.ones(1, 1, 3, 4), torch.ones(1, 3, 4), torch.ones(1, 3, 2))


def test_traces(built: None, dtype: torch.dtype) -> None:
    cos, sin = (table.to(dtype) for table in tables(1, 3, 8, True))
    torch.library.opcheck(
        torch.ops.skink_cpp.rotary.default,
        (torch.randn(2, 4, 3, 8).to(dtype), cos, sin, True),
        test_utils=("test_schema", "test_faketensor"),
    )
