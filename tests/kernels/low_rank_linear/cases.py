"""Calls of `low_rank_linear` that tests share, and the formula in float64."""

import torch
from torch import Tensor


def operands(
    lead: tuple[int, ...], width: int, rank: int, outputs: int, dtype: torch.dtype, *, bias: bool = True
) -> tuple[Tensor, ...]:
    """Input, down, up and bias, scaled so that results are about 1."""
    return (
        torch.randn(*lead, width).to(dtype),
        (torch.randn(rank, width) / max(1, width) ** 0.5).to(dtype),
        (torch.randn(outputs, rank) / max(1, rank) ** 0.5).to(dtype),
        *([torch.randn(outputs).to(dtype)] if bias else []),
    )


def exact(input: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in float64, summed term by term over the rank."""
    x, down, up = input.double(), down.double(), up.double()
    result = x.new_zeros((*x.shape[:-1], up.shape[0]))
    for row, column in zip(down, up.T, strict=True):
        result += (x * row).sum(-1, keepdim=True) * column
    return result if bias is None else result + bias.double()
