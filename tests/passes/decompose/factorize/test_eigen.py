import pytest
import torch

from skink.passes.decompose.factorize.eigen import leading, leading_at_random


def gram(size, decay):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
    values = torch.arange(1, size + 1).double().pow(-decay)
    return basis @ torch.diag(values) @ basis.T, values


def test_exactly():
    matrix, values = gram(30, 2.0)
    found, vectors = leading(matrix, 5)
    torch.testing.assert_close(found, values)
    torch.testing.assert_close(matrix @ vectors, vectors * values[:5])


@pytest.mark.parametrize("rank", [1, 8, 25, 30])
def test_at_random(rank):
    matrix, values = gram(30, 2.0)
    found, vectors = leading_at_random(matrix, rank)
    torch.testing.assert_close(found, values[:rank], rtol=1e-3, atol=0)
    assert (found <= values[:rank] * (1 + 1e-12)).all()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(rank).double())


def test_it_draws_the_same_numbers_every_time_and_none_of_others():
    matrix, _ = gram(60, 0.5)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, again = (leading_at_random(matrix, 4)[1] for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.rand(2), expected)
