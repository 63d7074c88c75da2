"""Raising of attention: what matches, near misses with their reasons, and the same numbers."""

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.modules import Three
from tests.passes.canonicalize.checking import HEADS, check

ATTENTION_DIMS = {"x": {0: "B", 2: "T"}, "y": {0: "B", 2: "T"}, "z": {0: "B", 2: "T"}}


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        ({}, "skink.attention(%x, %y, %z, causal=False, scale=0.35355339059327373)"),
        ({"is_causal": True}, "skink.attention(%x, %y, %z, causal=True, scale=0.35355339059327373)"),
        ({"is_causal": True, "scale": 0.5}, "skink.attention(%x, %y, %z, causal=True, scale=0.5)"),
    ],
)
@pytest.mark.parametrize("heads", [4, 2])
def test_attention(options: dict[str, Any], printed: str, heads: int) -> None:
    module = Three(lambda self, *parts: scaled_dot_product_attention(*parts, enable_gqa=heads < 4, **options))
    others = [(2, heads, 3, 8)] * 2
    assert check(module, HEADS, *map(torch.randn, others), dims=ATTENTION_DIMS)[:2] == ([printed], [])


@pytest.mark.parametrize(
    ("body", "shapes", "reason"),
    [
        (
            lambda self, x, y, z: scaled_dot_product_attention(x, y, y + 1, attn_mask=z > 0),
            [(2, 4, 3, 8), (2, 4, 3, 8), (3, 3)],
            "the mask depends on z, which is no padding mask [B, S]",
        ),
        (
            lambda self, x, y, z: scaled_dot_product_attention(x, y, z),
            [(2, 3, 8), (2, 3, 8), (2, 3, 8)],
            "3 dims, not [B, H, T, D]",
        ),
        (
            lambda self, x, y, z: scaled_dot_product_attention(x, y, z, is_causal=True),
            [(2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)],
            "causal with more keys than queries, which PyTorch aligns at the first",
        ),
        (
            lambda self, x, y, z: scaled_dot_product_attention(x, y, z),
            [(2, 4, 3, 8), (1, 4, 3, 8), (1, 4, 3, 8)],
            "batches or heads are broadcast",
        ),
        (
            lambda self, x, y, z: scaled_dot_product_attention(x, y, z),
            [(2, 1, 3, 8), (2, 4, 3, 8), (2, 4, 3, 8)],
            "batches or heads are broadcast",
        ),
    ],
    ids=["mask", "dims", "aligned", "batch", "heads"],
)
def test_near_misses_of_attention(body: Any, shapes: list[tuple[int, ...]], reason: str) -> None:
    ops, reasons, _ = check(Three(body), *map(torch.randn, shapes), dims={})
    assert (ops, reasons) == ([], [reason])
