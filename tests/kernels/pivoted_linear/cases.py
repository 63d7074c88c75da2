"""Calls of `pivoted_linear` that tests share, and the formula in float64."""

import torch
from torch import Tensor


def operands(
    lead: tuple[int, ...],
    width: int,
    rank: int,
    others: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    order: bool = True,
) -> tuple[Tensor | None, ...]:
    """Input, kept, rest, their biases and the order, scaled so that results are about 1."""
    biases = [torch.randn(size).to(dtype) for size in (rank, others)] if bias else [None, None]
    return (
        torch.randn(*lead, width).to(dtype),
        (torch.randn(rank, width) / max(1, width) ** 0.5).to(dtype),
        (torch.randn(others, rank) / max(1, rank) ** 0.5).to(dtype),
        *biases,
        torch.randperm(rank + others) if order else None,
    )


def exact(
    input: Tensor,
    kept: Tensor,
    rest: Tensor,
    kept_bias: Tensor | None = None,
    rest_bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """The formula in float64, as one dense matrix and one bias."""
    first, second = kept.double(), rest.double()
    bias = first.new_zeros(len(first)) if kept_bias is None else kept_bias.double()
    last = second @ bias + (0 if rest_bias is None else rest_bias.double())
    result = (input.double().unsqueeze(-2) * torch.cat([first, second @ first])).sum(-1) + torch.cat([bias, last])
    return result if order is None else torch.stack([result[..., place] for place in order.tolist()], -1)
