import pytest
import torch

from skink.passes.decompose.factorize.pivoted import pivoted


def factors(out, rank, width, decay=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(out + rank)
    scales = torch.logspace(0, -decay, rank, dtype=torch.float64)
    up = torch.randn(out, rank, dtype=torch.float64, generator=generator) * scales
    return up.to(dtype), torch.randn(rank, width, dtype=torch.float64, generator=generator).to(dtype)


@pytest.mark.parametrize(("out", "rank", "width"), [(24, 5, 10), (10, 9, 24), (64, 40, 64), (200, 150, 60), (40, 1, 3)])
@pytest.mark.parametrize("decay", [0.0, 6.0])
def test_it_is_the_same_product(out, rank, width, decay):
    up, down = factors(out, rank, width, decay)
    form, product = pivoted(up, down), up @ down
    torch.testing.assert_close(form.product(), product)
    torch.testing.assert_close(form.kept, product[form.pivots])
    stacked = torch.cat((form.kept, form.rest @ form.kept))
    torch.testing.assert_close(stacked[form.order], product)
    assert sorted(torch.cat((form.pivots, form.others)).tolist()) == list(range(out))
    assert form.numbers == rank * (out + width - rank)


@pytest.mark.parametrize("seed", range(5))
def test_no_row_is_a_large_combination(seed):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(120, 60, dtype=torch.float64, generator=generator)
    # Rows that are nearly the same, and some of hardly any size.
    up[:40] = up[40:80] + 1e-6 * up[:40]
    up[100:] *= 1e-5
    assert float(pivoted(up, torch.eye(60).double()).rest.abs().max()) <= 2.0 + 1e-9


def test_gaussian_elimination_alone_would_grow():
    # Wilkinson's matrix, below a unit matrix's worth of rows: elimination doubles the last column at every step.
    size = 24
    grows = torch.eye(size).double() - torch.ones(size, size).double().tril(-1)
    grows[:, -1] = 1.0
    up = torch.cat((grows, torch.ones(4, size).double()))
    form = pivoted(up, torch.eye(size).double())
    assert float(form.rest.abs().max()) <= 2.0 + 1e-9
    torch.testing.assert_close(form.product(), up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_little_more_than_thin_factors_do(dtype):
    up, down = factors(96, 48, 64)
    exact = up @ down
    thin = up.to(dtype).double() @ down.to(dtype).double()
    # The same product, rounded once, in either form.
    form = pivoted(up, down)
    rest, kept = form.rest.to(dtype).double(), form.kept.to(dtype).double()
    near = torch.cat((kept, rest @ kept))[form.order]
    assert float((near - exact).norm()) < 2.5 * float((thin - exact).norm())
