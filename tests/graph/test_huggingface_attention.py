"""Masks are recognised by asking them."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import masking_utils

from skink.graph.huggingface_attention import classify_mask


@pytest.mark.parametrize("distance_back", [1, 2, 5, 63, 100, 4096])
def test_windows_are_recognised(distance_back: int) -> None:
    mask = masking_utils.sliding_window_causal_mask_function(distance_back)
    assert classify_mask(mask) == (True, distance_back)


def test_causal_and_bidirectional_masks_are_recognised() -> None:
    assert classify_mask(masking_utils.causal_mask_function) == (True, 0)
    assert classify_mask(lambda batch, head, query, key: key >= 0) == (False, 0)


def raises(*_: Any) -> None:
    raise RuntimeError("no mask")


@pytest.mark.parametrize(
    "mask",
    [
        lambda batch, head, query, key: (key <= query) & (key // 16 == query // 16),
        lambda batch, head, query, key: (key <= query) & (key // 8192 == query // 8192),
        lambda batch, head, query, key: (key <= query) | (key < 10),
        lambda batch, head, query, key: (key - query).abs() < 8,
        lambda batch, head, query, key: key >= query,
        lambda batch, head, query, key: (key <= query) & ((key > query - 8) | (key < 4)),
        lambda batch, head, query, key: key < query,
        raises,
    ],
    ids=["chunks", "long-chunks", "prefix", "band", "upper", "sinks", "strict", "raises"],
)
def test_other_masks_are_not(mask: Callable[..., Any]) -> None:
    assert classify_mask(mask) is None
