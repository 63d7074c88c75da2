"""Columns picked by a gather, against PyTorch's index_select: numbers, shapes and gradients."""

import pytest
import torch

from skink.kernels.pivoted_linear.columns import index_select


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7)])
@pytest.mark.parametrize("order", [[3, 0, 6, 1, 5, 2, 4], [6, 6, 1], []])
def test_as_index_select(shape: tuple[int, ...], order: list[int]) -> None:
    rows = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    picked = torch.tensor(order, dtype=torch.int64)
    found, wanted = index_select(rows, -1, picked), rows.index_select(-1, picked)
    assert torch.equal(found, wanted)
    weights = torch.randn_like(wanted)
    ours, theirs = (torch.autograd.grad((value * weights).sum(), rows)[0] for value in (found, wanted))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_any_dim_of_a_view(dim: int) -> None:
    rows = torch.randn(4, 5, 6).transpose(0, 2)
    picked = torch.tensor([3, 1])
    assert torch.equal(index_select(rows, dim, picked), rows.index_select(dim, picked))
