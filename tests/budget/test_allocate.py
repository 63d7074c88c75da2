"""The allocator against brute force, and the laws that it keeps."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skink.budget import Curve, allocate
from skink.errors import BudgetError

# Costs are whole numbers, so that sums of them are exact.
choices = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 60)), min_size=1, max_size=5)
instances = st.lists(choices, min_size=1, max_size=4)


def curves_of(instance: list[list[tuple[int, int]]], *, loss: float = 1.0, cost: float = 1.0) -> list[Curve]:
    """Choices as (cost, loss)."""
    return [
        Curve(
            str(index),
            torch.tensor([entry[1] for entry in each], dtype=torch.float64) * loss,
            torch.tensor([entry[0] for entry in each], dtype=torch.float64) * cost,
        )
        for index, each in enumerate(instance)
    ]


def totals(curves: list[Curve], chosen: tuple[int, ...]) -> tuple[float, float]:
    """(cost, loss) of these choices."""
    pairs = list(zip(curves, chosen, strict=True))
    return (
        math.fsum(float(curve.costs[index]) for curve, index in pairs),
        math.fsum(float(curve.losses[index]) for curve, index in pairs),
    )


def optimum(curves: list[Curve], budget: float) -> float | None:
    """The least loss of all sets of choices that fit, or None."""
    every = itertools.product(*(range(len(curve.costs)) for curve in curves))
    return min((loss for cost, loss in (totals(curves, chosen) for chosen in every) if cost <= budget), default=None)


def largest_hull_step(curve: Curve) -> float:
    """The largest loss that one step along the lower convex hull of a curve saves: gift wrapping, from the cheapest."""
    points = sorted(zip(curve.costs.tolist(), curve.losses.tolist(), strict=True))
    here, largest = points[0], 0.0
    while better := [point for point in points if point[1] < here[1]]:
        slopes = [((point[1] - here[1]) / (point[0] - here[0] + 1e-300), -point[0], point) for point in better]
        nearest = min(slopes)[2]
        largest, here = max(largest, here[1] - nearest[1]), nearest
    return largest


@given(instances, st.integers(0, 40))
def test_within_one_hull_step_of_the_optimum(instance: list[list[tuple[int, int]]], budget: int) -> None:
    curves = curves_of(instance)
    best = optimum(curves, budget)
    if best is None:
        with pytest.raises(BudgetError):
            allocate(curves, budget)
        return
    cost, loss = totals(curves, allocate(curves, budget))
    assert cost <= budget
    assert best <= loss <= best + max(largest_hull_step(curve) for curve in curves)


@given(instances)
def test_more_budget_never_loses_more(instance: list[list[tuple[int, int]]]) -> None:
    curves = curves_of(instance)
    least = sum(int(curve.costs.min()) for curve in curves)
    most = sum(int(curve.costs.max()) for curve in curves)
    losses = [totals(curves, allocate(curves, budget))[1] for budget in range(least, most + 1)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == sum(float(curve.losses.min()) for curve in curves)


@given(instances, st.integers(0, 40), st.integers(-40, 40), st.integers(-40, 40))
def test_units_do_not_matter(instance: list[list[tuple[int, int]]], extra: int, loss: int, cost: int) -> None:
    curves = curves_of(instance)
    budget = sum(int(curve.costs.min()) for curve in curves) + extra
    scaled = curves_of(instance, loss=2.0**loss, cost=2.0**cost)
    assert allocate(scaled, budget * 2.0**cost) == allocate(curves, budget)


def test_smooth_curves_meet_the_threshold() -> None:
    # Loss a / r for r units: a price p takes r = sqrt(a / p), so that shares are as the roots of a.
    ranks = torch.arange(1, 3001, dtype=torch.float64)
    scales = (1.0, 4.0, 9.0, 16.0)
    curves = [Curve(str(scale), scale / ranks, ranks) for scale in scales]
    found = allocate(curves, 1000.0)
    assert [index + 1 for index in found] == [100, 200, 300, 400]


def test_what_is_left_is_spent_on_upgrades_that_fit() -> None:
    # The hull of the first goes straight from 0 to 10; with 7 units only its choice at 6, off the hull, is in reach.
    first = Curve("first", torch.tensor([10.0, 9.0, 0.0]), torch.tensor([0.0, 6.0, 10.0]))
    second = Curve("second", torch.tensor([1.0, 0.5]), torch.tensor([0.0, 1.0]))
    assert allocate([first, second], 7.0) == (1, 1)
    assert allocate([first, second], 10.0) == (2, 0)


def test_a_choice_that_is_not_finite_is_never_taken() -> None:
    curve = Curve("a", torch.tensor([math.nan, 3.0, math.inf, 2.0]), torch.tensor([0.0, 2.0, 3.0, 4.0]))
    assert allocate([curve], 3.0) == (1,)
    with pytest.raises(BudgetError):
        allocate([curve], 1.0)


def test_a_sum_that_rounds_up_still_fits() -> None:
    tenth = torch.tensor([0.0, 0.1], dtype=torch.float64)
    curves = [Curve(str(index), torch.tensor([1.0, 0.0]), tenth) for index in range(3)]
    assert allocate(curves, 0.3) == (1, 1, 1)  # 0.1 + 0.1 + 0.1 > 0.3


def test_no_curves() -> None:
    assert allocate([], 1.0) == ()


def test_a_budget_out_of_reach_names_the_least() -> None:
    curves = [
        Curve("a", torch.tensor([2.0, 0.0]), torch.tensor([30.0, 100.0])),
        Curve("dense", torch.tensor([0.0]), torch.tensor([100.0])),
    ]
    with pytest.raises(BudgetError, match="BUDGET-001") as caught:
        allocate(curves, 100.0)
    assert "the budget of 100 is too small: 130 is the least, of 200 as it is." in str(caught.value)
    assert "allow a share of 0.65 or more" in str(caught.value)
    assert allocate(curves, 130.0) == (0, 0)
    # What has no choice counts, in the budget and in the message.
    assert allocate(curves[:1], 130.0, fixed=100.0) == (0,)
    with pytest.raises(BudgetError, match="too small: 130 is the least, of 200 as it is"):
        allocate(curves[:1], 129.0, fixed=100.0)


def test_the_share_that_is_named_is_enough() -> None:
    # All choices lose alike, as where ranks are the same for all: what is there is the dearest.
    curve = Curve("a", torch.zeros(3), torch.tensor([1.0, 2.0, 7.0]))
    with pytest.raises(BudgetError, match=r"allow a share of 0\.1429 or more"):
        allocate([curve], 0.5)
    assert allocate([curve], 0.1429 * 7.0) == (0,)


@pytest.mark.parametrize(
    ("losses", "costs"), [([1.0], [1.0, 2.0]), ([math.nan], [1.0]), ([1.0, 2.0], [1.0, math.inf]), ([], [])]
)
def test_a_curve_needs_finite_numbers(losses: list[float], costs: list[float]) -> None:
    with pytest.raises(ValueError, match=r"q: (losses|no choice)"):
        Curve("q", torch.tensor(losses), torch.tensor(costs))
