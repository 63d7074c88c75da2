"""The reference of attention, against a float64 formula written with loops and against PyTorch's own."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from skink.kernels import ATTENTION
from skink.kernels.attention.reference import allowed_keys, attention
from tests.kernels.attention.cases import Case, cases, formula
from tests.kernels.closeness import assert_close, perturbed


@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_formula(case: Case) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tensors, options = case.arguments(dtype)
        found = attention(*tensors, **options)
        assert found.dtype is dtype
        exact = formula(*(t if t is None or t.dtype is torch.bool else t.double() for t in tensors), **options)
        assert_close(ATTENTION, found, exact)
        with pytest.raises(AssertionError, match="off by"):
            assert_close(ATTENTION, perturbed(ATTENTION, found), exact)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_pytorchs_own(grouped: bool, causal: bool) -> None:
    query = torch.randn(2, 4, 7, 8)
    key, value = torch.randn(2, 2, 2 if grouped else 4, 7, 8).unbind(0)
    wanted = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=0.3, enable_gqa=grouped)
    torch.testing.assert_close(attention(query, key, value, causal=causal, scale=0.3), wanted)


def test_queries_are_the_last_positions() -> None:
    query, key, value = torch.randn(3, 1, 2, 9, 4).unbind(0)
    whole = attention(query, key, value, scale=0.5, window=3)
    torch.testing.assert_close(attention(query[:, :, 5:], key, value, scale=0.5, window=3), whole[:, :, 5:])


def test_the_tail_of_a_longer_mask_counts() -> None:
    query, key, value = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    mask = torch.tensor([[False, False, False, True, False, True]])
    found = attention(query, key, value, mask, scale=0.5)
    two = attention(query, key[:, :, ::2], value[:, :, ::2], scale=0.5)
    torch.testing.assert_close(found, two)


def test_a_query_that_may_see_nothing_gets_the_mean_of_all_values() -> None:
    query, key, value = torch.randn(3, 1, 2, 4, 4).unbind(0)
    mask = torch.tensor([[False, False, True, True]])
    found = attention(query, key, value, mask, scale=0.5)
    torch.testing.assert_close(found[:, :, 0], value.mean(2))
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_scores_stay_finite(dtype: torch.dtype) -> None:
    query = torch.full((1, 1, 3, 4), 100.0, dtype=dtype)
    value = torch.eye(3, dtype=dtype)[None, None]
    found = attention(query, query, value, scale=1.0)
    torch.testing.assert_close(found[0, 0, 2], torch.full((3,), 1 / 3, dtype=dtype), rtol=1e-2, atol=1e-2)


def test_sinks_take_a_share_of_the_weight() -> None:
    query, key, value = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3, 4)
    found = attention(query, key, value, scale=1.0, sinks=torch.tensor([0.0, math.log(5.0)]))
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([3 / 4, 3 / 8]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_which_keys_are_allowed(causal: bool, window: int, masked: bool) -> None:
    queries, keys = 3, 5
    mask = torch.tensor([[True, False, True, True, False, True]]) if masked else None
    found = allowed_keys(queries, keys, mask, causal=causal, window=window, device=torch.device("cpu"))
    if not (causal or window or masked):
        assert found is None
        return
    assert isinstance(found, Tensor)
    for i, j in itertools.product(range(queries), range(keys)):
        position = keys - queries + i
        wanted = (not causal or j <= position) and (window == 0 or j > position - window)
        wanted = wanted and (mask is None or bool(mask[0, 1 + j]))
        assert bool(found.expand(1, 1, queries, keys)[0, 0, i, j]) == wanted
