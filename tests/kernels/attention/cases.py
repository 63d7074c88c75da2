"""Calls of attention over a grid, and the formula written with loops in float64."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call: numbers of query and key heads, of queries and keys, and options."""

    heads: tuple[int, int] = (4, 4)
    tokens: tuple[int, int] = (5, 5)
    causal: bool = True
    window: int = 0
    padding: bool = False
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    sizes: tuple[int, int] = (8, 8)

    def __str__(self) -> str:
        flags = [name for name in ("padding", "sinks", "alibi") if getattr(self, name)]
        kind = "causal" if self.causal else "full"
        return f"{kind}-{self.heads}-{self.tokens}-w{self.window}-c{self.softcap:g}-{self.sizes}-{'-'.join(flags)}"

    def arguments(self, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], dict[str, Any]]:
        """Random tensors, and options by name. The first sequence begins with padding, the mask with older columns."""
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        (heads, groups), (queries, keys), (size, out) = self.heads, self.tokens, self.sizes
        tensors = random(2, heads, queries, size), random(2, groups, keys, size), random(2, groups, keys, out)
        mask = None
        if self.padding:
            mask = torch.ones(2, keys + 2, dtype=torch.bool)
            mask[0, : 2 + (keys + 1) // 2] = False
        sinks = random(heads) if self.sinks else None
        return (*tensors, mask), {
            "causal": self.causal,
            "scale": size**-0.5,
            "window": self.window,
            "softcap": self.softcap,
            "sinks": sinks,
            "alibi": random(heads) if self.alibi else None,
        }


def cases() -> list[Case]:
    """Every option alone and together, prefill, decode and in between, odd sizes."""
    return [
        Case(),
        Case(causal=False),
        Case(causal=False, tokens=(3, 7)),
        Case(causal=False, window=2),
        Case(heads=(4, 2), tokens=(1, 9)),
        Case(heads=(6, 1), tokens=(3, 7), padding=True),
        Case(tokens=(1, 1), window=1),
        Case(tokens=(7, 7), window=3),
        Case(tokens=(2, 13), window=4, padding=True, heads=(4, 2)),
        Case(tokens=(4, 6), window=100),
        Case(padding=True),
        Case(padding=True, causal=False),
        Case(softcap=2.0, heads=(4, 2), tokens=(3, 8), padding=True),
        Case(sinks=True, heads=(4, 2), tokens=(3, 8), padding=True),
        Case(softcap=1.5, sinks=True, window=3, tokens=(5, 9)),
        Case(alibi=True),
        Case(alibi=True, causal=False, tokens=(3, 7)),
        Case(alibi=True, heads=(4, 2), tokens=(4, 9), window=3, padding=True),
        Case(alibi=True, heads=(4, 2), tokens=(3, 8), padding=True, softcap=2.0, sinks=True),
        Case(tokens=(65, 67), sizes=(5, 3), heads=(2, 1)),
        Case(tokens=(20, 33), window=6, heads=(4, 2), padding=True),
    ]


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    *,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    alibi: Tensor | None,
) -> Tensor:
    """Softmax attention, one query at a time, in float64."""
    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    keys = key.shape[2]
    result = torch.zeros(batch, heads, queries, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                position = keys - queries + i
                seen = [
                    j
                    for j in range(keys)
                    if (not causal or j <= position)
                    and (window == 0 or j > position - window)
                    and (key_mask is None or bool(key_mask[b, key_mask.shape[1] - keys + j]))
                ]
                if not seen:
                    # A row of padding: every score is the same, and the least there is.
                    result[b, h, i] = value[b, h // group].mean(0) if sinks is None else 0.0
                    continue
                scores = [scale * float(query[b, h, i] @ key[b, h // group, j]) for j in seen]
                if softcap:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                if alibi is not None:
                    scores = [score + float(alibi[h]) * (j - position) for score, j in zip(scores, seen, strict=True)]
                exponents = [math.exp(score) for score in scores]
                total = sum(exponents) + (math.exp(float(sinks[h])) if sinks is not None else 0.0)
                for j, exponent in zip(seen, exponents, strict=True):
                    result[b, h, i] += exponent / total * value[b, h // group, j]
    return result
