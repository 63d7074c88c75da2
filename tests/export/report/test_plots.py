import math
from xml.etree import ElementTree

import pytest

from skink.export.report.plots import Bar, Column, axis_ticks, bars, columns, largest


def rects(drawing, class_):
    return [rect for rect in ElementTree.fromstring(drawing).iter("rect") if rect.get("class") == class_]


def test_bar_lengths_are_in_proportion_and_fit_the_longest_whisker():
    rows = [Bar("a", 10.0, "10", low=9.0, high=20.0), Bar("b", 5.0, "5", series=1)]
    drawing = bars("p", "Title", "desc", rows)
    (first,), (second,) = rects(drawing, "s0"), rects(drawing, "s1")
    assert float(first.get("width")) == pytest.approx(2 * float(second.get("width")), abs=0.02)
    tip = max(float(path.get("d").split("H")[1].split("M")[0]) for path in ElementTree.fromstring(drawing).iter("path"))
    assert float(first.get("width")) == pytest.approx(tip / 2, abs=0.02)
    assert tip <= float(ElementTree.fromstring(drawing).get("viewBox").split()[2])


def test_a_missing_value_has_a_label_and_no_bar_and_an_infinite_one_fills_its_track():
    drawing = bars(
        "p", "t", "d", [Bar("gone", None, "not measured"), Bar("big", math.inf, "∞"), Bar("nan", math.nan, "?")]
    )
    assert [float(rect.get("width")) for rect in rects(drawing, "s0")] == [320.0]
    assert "not measured" in drawing


@pytest.mark.parametrize("rows", [[], [Bar("zero", 0.0, "0")]])
def test_nothing_to_scale_by(rows):
    ElementTree.fromstring(bars("p", "t", "d", rows))


def test_svg_is_named_for_those_who_cannot_see_it():
    drawing = ElementTree.fromstring(bars("p1", "Size <1>", "a: 1", [Bar("a", 1.0, "1")]))
    assert drawing.get("role") == "img"
    assert drawing.get("aria-labelledby") == "p1-title p1-desc"
    assert drawing.find("title").text == "Size <1>"
    assert drawing.find("desc").text == "a: 1"


def test_column_heights_are_in_proportion_and_pairs_do_not_overlap():
    drawing = columns("c", "t", "d", [Column("0", "l0", 0.1, 0.2), Column("1", "l1", 0.4, 0.3)], top=0.4)
    ours, theirs = rects(drawing, "ours"), rects(drawing, "theirs")
    assert float(ours[1].get("height")) == pytest.approx(4 * float(ours[0].get("height")), abs=0.05)
    feet = {round(float(rect.get("y")) + float(rect.get("height")), 1) for rect in ours + theirs}
    axis = next(path for path in ElementTree.fromstring(drawing).iter("path") if path.get("class") == "axis")
    assert feet == {float(axis.get("d").split()[1].split("H")[0])}
    assert float(ours[0].get("x")) + float(ours[0].get("width")) <= float(theirs[0].get("x")) + 0.02


def test_a_layer_left_alone_is_marked():
    drawing = columns("c", "t", "d", [Column("0", "l0", None, left_alone=True)], top=1.0)
    assert 'class="cross"' in drawing


def test_too_many_columns_are_drawn_in_runs_that_keep_the_peak():
    places = [Column(str(i), f"layer {i}", 9.0 if i == 777 else 1.0) for i in range(1000)]
    drawing = columns("c", "t", "d", places, top=9.0)
    heights = [float(rect.get("height")) for rect in rects(drawing, "ours")]
    assert len(heights) == 200
    assert heights.count(max(heights)) == 1
    assert "largest of 5" in drawing


def test_labels_keep_their_distance():
    drawing = columns("c", "t", "d", [Column(str(i), "", 1.0) for i in range(80)], top=1.0)
    shown = [int(e.text) for e in ElementTree.fromstring(drawing).iter("text") if e.get("text-anchor") == "middle"]
    assert shown == list(range(0, 80, 5))


@pytest.mark.parametrize(
    ("top", "ticks"), [(0.4, [0, 0.2, 0.4]), (300.0, [0, 100, 200, 300]), (0.0, [0, 1]), (7.0, [0, 2.5, 5, 7.5])]
)
def test_axis_ticks(top, ticks):
    assert axis_ticks(top) == ticks


def test_largest_ignores_what_is_not_finite():
    assert largest([Column("", "", math.inf, 0.2), Column("", "", None)]) == 0.2
    assert largest([]) == 0.0
