import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skink.exploration.scatter import Dot, axis, scatter

FINITE = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(FINITE, min_size=1, max_size=6))
def test_axes_reach_over_their_values(values):
    found = axis("x", values)
    assert not found.logarithmic
    assert found.ticks[0] <= min(values) + 1e-6 * abs(min(values)) + 1e-9
    assert found.ticks[-1] >= max(values) - 1e-6 * abs(max(values)) - 1e-9
    assert list(found.ticks) == sorted(set(found.ticks))
    assert 2 <= len(found.ticks) <= 9


@given(st.floats(1e-3, 1e6), st.floats(2, 1e8))
def test_logarithmic_axes(low, times):
    found = axis("x", [low, low * times], may_be_logarithmic=True)
    assert found.logarithmic
    assert 0 <= found.share(low) < found.share(low * times) <= 1
    assert 2 <= len(found.ticks) <= 9
    assert found.share(math.sqrt(found.ticks[0] * found.ticks[-1])) == pytest.approx(0.5)


def test_small_ranges_stay_linear():
    assert not axis("x", [8.0, 9.0], may_be_logarithmic=True).logarithmic
    assert not axis("x", [-8.0, 90.0], may_be_logarithmic=True).logarithmic


def draw(dots, front, low=True):
    across, up = axis("x", [dot.x for dot in dots]), axis("y", [dot.y for dot in dots])
    return ElementTree.fromstring(scatter("id", "A <title>", "What it shows", dots, front, across, up, low=low))


DOTS = [
    Dot(10, 5, "one & only", link="p1", number="1"),
    Dot(20, 4, "two", number="2", series=3),
    Dot(30, 9, "dense", dense=True),
]


def test_every_dot_is_drawn_in_its_place_with_its_text():
    root = draw(DOTS, [0, 1])
    circles = {circle.find("title").text: circle for circle in root.iter("circle")}
    assert set(circles) == {"one & only", "two"}
    assert float(circles["one & only"].get("cx")) < float(circles["two"].get("cx"))
    # Down is more on a screen.
    assert float(circles["one & only"].get("cy")) < float(circles["two"].get("cy"))
    assert "best" in circles["two"].get("class")
    assert [path.find("title").text for path in root.iter("path") if "dense" in path.get("class")] == ["dense"]
    assert [link.get("href") for link in root.iter("a")] == ["#p1"]


def test_the_front_is_a_staircase():
    (front,) = [path.get("d") for path in draw(DOTS, [0, 1]).iter("path") if path.get("class") == "front"]
    circles = {circle.find("title").text: circle for circle in draw(DOTS, [0, 1]).iter("circle")}
    one, two = ((float(circles[each].get("cx")), float(circles[each].get("cy"))) for each in ("one & only", "two"))
    assert front == f"M{one[0]:.1f} {one[1]:.1f}H{two[0]:.1f}V{two[1]:.1f}"
    assert not [path for path in draw(DOTS, [0]).iter("path") if path.get("class") == "front"]


def test_numbers_stand_where_no_better_point_can():
    def height(low):
        (text,) = [
            text
            for text in draw(DOTS, [0], low=low).iter("text")
            if text.text == "1" and text.get("text-anchor") == "end"
        ]
        return float(text.get("y"))

    assert height(True) > height(False)


def test_close_numbers_are_left_out():
    dots = [Dot(0, 0, "a", number="7"), Dot(0.01, -0.01, "b", number="8"), Dot(100, -100, "c", number="9")]
    texts = [text.text for text in draw(dots, [0, 1, 2]).iter("text")]
    assert "7" in texts
    assert "8" not in texts
    assert "9" in texts
