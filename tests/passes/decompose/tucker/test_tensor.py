import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skink.passes.decompose.tucker.tensor import relative_error, three_factors, tucker


def tensor(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def hosvd(exact, ranks):
    """The truncated HOSVD as its authors write it: singular vectors of each unfolding, and the tensor between them."""
    projected = exact
    for mode, rank in enumerate(ranks):
        if rank is not None:
            order = [mode, *(other for other in range(exact.dim()) if other != mode)]
            vectors = torch.linalg.svd(exact.permute(order).reshape(exact.shape[mode], -1), full_matrices=False)[0]
            onto = vectors[:, :rank] @ vectors[:, :rank].T
            order = "abcd"[: exact.dim()]
            projected = torch.einsum(f"z{order[mode]},{order}->{order.replace(order[mode], 'z')}", onto, projected)
    return projected


@pytest.mark.parametrize("ranks", [(3, 2, 4), (3, 2, None), (None, 5, None), (6, 5, 4)])
def test_without_iterations_it_is_the_truncated_hosvd(ranks):
    exact = tensor(6, 5, 4)
    found = tucker(exact, ranks)
    torch.testing.assert_close(found.tensor(), hosvd(exact, ranks), rtol=1e-10, atol=1e-12)
    assert found.core.shape == tuple(rank or size for rank, size in zip(ranks, exact.shape, strict=True))
    for rank, factor in zip(ranks, found.factors, strict=True):
        assert (factor is None) == (rank is None)
        if factor is not None:
            torch.testing.assert_close(factor.T @ factor, torch.eye(rank, dtype=torch.float64))


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 4))
def test_no_iteration_raises_the_error(out, in_, iterations):
    exact = tensor(6, 7, 3)
    errors = [
        relative_error(exact, tucker(exact, (out, in_, None), iterations=count).tensor())
        for count in (iterations, iterations + 1)
    ]
    assert errors[1] <= errors[0] + 1e-12


def test_iterations_find_what_the_first_guess_misses():
    exact = tensor(8, 8, 3)
    first, better = (relative_error(exact, tucker(exact, (2, 2, None), iterations=n).tensor()) for n in (0, 10))
    assert better < first - 1e-4


def test_at_full_rank_it_is_exact():
    exact = tensor(6, 5, 3, 3)
    assert relative_error(exact, tucker(exact, (6, 5, None, None), iterations=1).tensor()) < 1e-14


def test_a_matrix_in_three_factors_has_a_diagonal_core():
    exact = tensor(9, 6)
    left, values, right = torch.linalg.svd(exact)
    up, core, down = three_factors(left[:, :4] * values[:4].sqrt(), values[:4, None].sqrt() * right[:4], 4, 4)
    torch.testing.assert_close(core.abs(), torch.diag(values[:4]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(up @ core @ down, (left[:, :4] * values[:4]) @ right[:4])
    torch.testing.assert_close(up.T @ up, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(down @ down.T, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize(("rank_out", "rank_in"), [(2, 5), (5, 2)])
def test_unequal_ranks_give_the_product_of_the_lesser(rank_out, rank_in):
    up, down = tensor(9, 5), tensor(5, 6)
    first, core, last = three_factors(up, down, rank_out, rank_in)
    assert core.shape == (rank_out, rank_in)
    torch.testing.assert_close(first @ core @ last, up[:, :2] @ down[:2])


def test_the_error_of_nothing_is_nothing():
    assert relative_error(torch.zeros(3).double(), torch.ones(3).double()) == 0.0
    assert relative_error(torch.ones(4).double(), torch.zeros(4).double()) == 1.0
