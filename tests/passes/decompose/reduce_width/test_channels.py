import pytest
import torch

from skink.passes.decompose.reduce_width.channels import (
    compensated,
    elimination_order,
    head_bases,
    head_order,
    leverage_order,
    prices,
    smoothed,
    unit_order,
)


def spd(size, seed, rank=None):
    """A PSD matrix float64[size, size] with eigenvalues far apart."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.randn(size, rank or 2 * size, generator=generator, dtype=torch.float64)
    sides *= torch.logspace(0, -1.5, rank or 2 * size, dtype=torch.float64)
    return sides @ sides.mT


def matrix(out, size, seed):
    return torch.randn(out, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def price_of(weight, covariance, gradients, kept):
    """1/2 tr(G D C D^T), D the change that is left when the kept columns are fitted by least squares."""
    root = torch.linalg.cholesky(covariance)  # rows of root^T stand for tokens
    tokens = root.mT
    fitted = torch.linalg.lstsq(tokens[:, kept], tokens @ weight.mT).solution.mT
    change = weight.clone()
    change[:, kept] -= fitted
    metric = torch.eye(len(weight), dtype=torch.float64) if gradients is None else gradients
    return float((metric @ change @ covariance * change).sum()) / 2


@pytest.mark.parametrize("two_sided", [True, False])
def test_prices_are_those_of_the_least_squares_fit_at_every_width(two_sided):
    weight, covariance, gradients = matrix(5, 9, 0), spd(9, 1), spd(5, 2) if two_sided else None
    order = torch.tensor([4, 2, 8, 0, 1, 7, 3, 6, 5])
    found = prices(weight, covariance, gradients, order)
    expected = [price_of(weight, covariance, gradients, order[:k].tolist()) for k in range(1, 10)]
    torch.testing.assert_close(found[1:], torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)
    nothing = weight @ covariance @ weight.mT
    assert float(found[0]) == pytest.approx(float((nothing if gradients is None else gradients @ nothing).trace()) / 2)


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("two_sided", [True, False])
def test_elimination_is_the_greedy_one_however_it_is_blocked(block, two_sided):
    weight, covariance, gradients = matrix(5, 11, 3), spd(11, 4), spd(5, 5) if two_sided else None
    left, gone = list(range(11)), []
    while len(left) > 1:
        rises = {j: price_of(weight, covariance, gradients, [i for i in left if i != j]) for j in left}
        least = min(rises, key=rises.get)
        left.remove(least)
        gone.append(least)
    expected = [*left, *gone[::-1]]
    assert elimination_order(weight, covariance, gradients, block=block).tolist() == expected


def test_two_sides_choose_otherwise_than_one():
    weight, covariance = matrix(5, 30, 6), spd(30, 7)
    assert (
        elimination_order(weight, covariance, spd(5, 8)).tolist()
        != elimination_order(weight, covariance, None).tolist()
    )


def test_the_second_weight_is_the_least_squares_fit():
    tokens, weight, kept = matrix(50, 8, 9), matrix(3, 8, 10), torch.tensor([1, 4, 6])
    expected = torch.linalg.lstsq(tokens[:, kept], tokens @ weight.mT).solution.mT
    torch.testing.assert_close(compensated(weight, tokens.mT @ tokens, kept), expected, rtol=1e-6, atol=1e-8)


def test_dead_channels_go_first_and_for_nothing():
    weight, covariance = matrix(4, 10, 11), spd(10, 12)
    dead = [2, 7]
    covariance[dead] = 0.0
    covariance[:, dead] = 0.0
    order = elimination_order(weight, covariance, spd(4, 13))
    assert sorted(order[-2:].tolist()) == dead
    assert float(prices(weight, covariance, None, order)[8]) < 1e-6
    assert torch.isfinite(compensated(weight, covariance, order[:8])).all()


def test_repeated_channels_go_for_nothing():
    tokens = matrix(40, 6, 14)
    tokens[:, 5] = 2 * tokens[:, 1] - tokens[:, 3]
    weight, covariance = matrix(4, 6, 15), tokens.mT @ tokens / 40
    order = elimination_order(weight, covariance, spd(4, 16))
    assert order[-1] in (1, 3, 5)
    assert float(prices(weight, covariance, None, order)[5]) < 1e-5
    new = compensated(weight, covariance, order[:5])
    torch.testing.assert_close(tokens[:, order[:5]] @ new.mT, tokens @ weight.mT, rtol=1e-4, atol=1e-4)


def test_leverage_scores():
    covariance = spd(7, 17)
    ridge = covariance.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    scores = (covariance @ torch.linalg.inv(covariance + ridge)).diagonal()
    assert leverage_order(covariance).tolist() == scores.argsort(descending=True).tolist()


def test_a_head_basis_is_the_two_sided_optimum_at_every_width():
    weight, covariance, gradients = matrix(6, 5, 18), spd(5, 19), spd(6, 20)
    bases = head_bases(weight[:, None, :], covariance[None, :, None, :].movedim(0, 0).view(1, 5, 1, 5), gradients, 1)
    torch.testing.assert_close(bases[0] @ bases[0].mT, torch.eye(5, dtype=torch.float64))
    left, right = torch.linalg.cholesky(gradients).mT, torch.linalg.cholesky(covariance)
    spectrum = torch.linalg.svdvals(left @ weight @ right).square() / 2
    found = prices(weight @ bases[0].mT, bases[0] @ covariance @ bases[0].mT, gradients, torch.arange(5))
    tails = torch.stack([spectrum[k:].sum() for k in range(6)])
    torch.testing.assert_close(found, tails, rtol=1e-5, atol=1e-8)


def test_heads_that_share_values_share_a_basis():
    weight, covariance = matrix(6, 4 * 3, 21).view(6, 4, 3), spd(12, 22).view(4, 3, 4, 3)
    bases = head_bases(weight, covariance, None, 2)
    assert bases.shape == (2, 3, 3)
    inside = (covariance[2, :, 2] + covariance[3, :, 3]) / 2
    stacked = torch.cat((weight[:, 2], weight[:, 3]))
    values, vectors = torch.linalg.eigh(
        torch.linalg.cholesky(inside).mT @ stacked.mT @ stacked @ torch.linalg.cholesky(inside)
    )
    reader = vectors[:, -1] @ torch.linalg.inv(torch.linalg.cholesky(inside))
    cosine = torch.cosine_similarity(bases[1, 0], reader, dim=0)
    assert abs(float(cosine)) == pytest.approx(1.0, abs=1e-6)
    assert (values >= 0).all()


def test_the_first_of_every_head_before_the_second_of_any():
    assert head_order(3, 2).tolist() == [0, 2, 4, 1, 3, 5]


def test_units_go_by_what_they_add_for_their_width():
    price, widths = spd(6, 23), [2, 1, 1, 2, 1, 1]
    order = unit_order(price, widths)
    gone: list[int] = []
    for step in range(6):
        rises = {
            unit: (price[[*gone, unit]][:, [*gone, unit]].sum() - price[gone][:, gone].sum()) / widths[unit]
            for unit in range(6)
            if unit not in gone
        }
        gone.append(min(rises, key=rises.get))
        assert order[: step + 1].tolist() == gone


def test_smoothing_raises_the_diagonal_by_a_share_of_its_mean():
    gradients = torch.diag(torch.tensor([0.0, 2.0], dtype=torch.float64))
    assert smoothed(gradients, 0.5).tolist() == [[0.5, 0.0], [0.0, 2.5]]
    assert gradients[0, 0] == 0
