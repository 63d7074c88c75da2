"""Curves: ticks, thinning, and drawings that are well-formed."""

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from skink.export.report.curves import Line, curves, thinned, ticks_between


@pytest.mark.parametrize(
    ("low", "high"), [(2.1, 2.9), (0, 1), (-0.5, 0.2), (8.0, 8.0), (0, 0), (1e-9, 3e-9), (10, 900)]
)
def test_ticks_are_round_and_reach_over_both_ends(low: float, high: float) -> None:
    ticks = ticks_between(low, high)
    assert 3 <= len(ticks) <= 7
    assert ticks[0] <= low
    assert ticks[-1] >= high
    steps = {round((two - one) / (ticks[1] - ticks[0]), 6) for one, two in pairwise(ticks)}
    assert steps == {1.0}


def test_a_curve_is_drawn_within_its_axes() -> None:
    points = [(index * 100.0, 4.0 / (index + 1)) for index in range(2000)]
    drawing = curves("one", "Loss", "it falls", [Line("training", points, "ours")], "tokens read")
    root = ElementTree.fromstring(str(drawing))
    [path] = [entry.get("d") or "" for entry in root.findall("./g/path")]
    places = [tuple(map(float, place.split())) for place in path.removeprefix("M").split("L")]
    assert len(places) <= 450
    assert all(46 <= x <= 492 and 8 <= y <= 156 for x, y in places)
    assert places[0][1] < places[-1][1]  # down is more in SVG
    assert [entry.text for entry in root.findall("text")][-1] == "tokens read"


def test_a_single_point_is_a_dot() -> None:
    drawing = str(curves("one", "Loss", "", [Line("held-out", [(0.0, 2.0)], "ours", dots=True)], "tokens"))
    assert drawing.count("<circle") == 1
    assert '<path d="M46.0' not in drawing


@pytest.mark.parametrize("points", [[], [(0.0, math.nan)], [(1.0, math.inf)]])
def test_without_a_number_there_is_no_plot(points: list[tuple[float, float]]) -> None:
    assert curves("none", "Loss", "", [Line("a", points, "ours")], "tokens") is None


def test_thinning_keeps_the_end() -> None:
    points = [(float(index), 1.0) for index in range(1001)]
    assert len(thinned(points, 100)) == 100
    assert thinned(points, 100)[-1] == (1000.0, 1.0)
    assert thinned(points[:5], 100) == points[:5]
