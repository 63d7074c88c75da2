"""Curves of ranks."""

import pytest
import torch

from skink.budget import allocate, rank_curve
from skink.budget.target import CountPricing
from skink.errors import OptionError


def discarded(size: int) -> torch.Tensor:
    """The loss at each rank for singular values size, size - 1, ... 1."""
    values = torch.arange(size, 0, -1, dtype=torch.float64).square()
    return torch.cat((values.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)))


def test_ranks_that_save_and_then_dense() -> None:
    losses = discarded(8)
    curve, ranks = rank_curve("q_proj", losses, (8, 8), CountPricing())
    # 8 x 8 in rank 4 takes 64 numbers, as many as the matrix.
    assert ranks.tolist() == [1, 2, 3, 0]
    assert curve.costs.tolist() == [16.0, 32.0, 48.0, 64.0]
    assert curve.losses.tolist() == [*losses[1:4].tolist(), 0.0]
    assert curve.name == "q_proj"


@pytest.mark.parametrize(
    ("multiple", "floor", "expected"),
    [
        (1, 3, [3, 4, 5, 6, 7, 0]),
        (2, 3, [4, 6, 0]),
        (3, 0, [3, 6, 0]),
        (8, 0, [0]),
        (17, 0, [0]),
        (40, 0, [0]),
        (1, 99, [0]),
    ],
)
def test_multiples_and_a_floor(multiple: int, floor: int, expected: list[int]) -> None:
    _, ranks = rank_curve("w", discarded(16), (16, 16), CountPricing(), multiple=multiple, floor=floor)
    assert ranks.tolist() == expected


def test_a_rank_whose_loss_is_not_finite_is_not_offered() -> None:
    losses = discarded(8)
    losses[2:] = torch.inf
    assert rank_curve("w", losses, (8, 8), CountPricing())[1].tolist() == [1, 0]


def test_pivots_save_at_every_rank_but_the_full_one() -> None:
    curve, ranks = rank_curve("w", discarded(8), (8, 8), CountPricing(), pivoted=True)
    assert ranks.tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    assert curve.costs.tolist() == [15.0, 28.0, 39.0, 48.0, 55.0, 60.0, 63.0, 64.0]


def test_work_counts_each_use_and_size_does_not() -> None:
    assert rank_curve("w", discarded(8), (8, 8), CountPricing(per_use=True), uses=2)[0].costs[0] == 32
    assert rank_curve("w", discarded(8), (8, 8), CountPricing(), uses=2)[0].costs[0] == 16


def test_rounding_below_zero_is_no_gain() -> None:
    losses = discarded(8)
    losses[3] = -1e-18
    curve, _ = rank_curve("w", losses, (8, 8), CountPricing())
    assert curve.losses[2] == 0.0


def test_a_budget_spends_the_ranks_where_they_save_most() -> None:
    # The second matrix loses a hundred times as much at each rank.
    curves, ranks = zip(
        *(rank_curve(str(scale), discarded(32) * scale, (32, 32), CountPricing()) for scale in (1.0, 100.0)),
        strict=True,
    )
    chosen = [int(rank[index]) for rank, index in zip(ranks, allocate(curves, 1024.0), strict=True)]
    assert 0 < chosen[0] < chosen[1]


@pytest.mark.parametrize(("name", "options"), [("multiple_of", {"multiple": 0}), ("floor", {"floor": -1})])
def test_options_out_of_range(name: str, options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=rf"OPTION-002.*{name}"):
        rank_curve("w", discarded(8), (8, 8), CountPricing(), **options)


def test_as_many_losses_as_ranks() -> None:
    with pytest.raises(ValueError, match="8 losses for a matrix"):
        rank_curve("w", discarded(7), (8, 8), CountPricing())
