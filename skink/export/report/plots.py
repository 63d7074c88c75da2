"""Plots as inline SVG: bars by form or pass, and columns by layer. All lengths are in SVG user units (CSS pixels)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from skink.export.report import formatting as fmt
from skink.export.report.markup import Child, Markup, tag

_BAR_WIDTH = 320
_COLUMNS_WIDTH = 500
# More columns than this in one plot would be thinner than a pixel.
_MOST_COLUMNS = 220
_CHARACTER = 6.2


@dataclass(frozen=True)
class Bar:
    """One bar: `text` is the value as shown and `note` what stands behind it.

    `low` and `high` end its whisker, `series` picks its colour.
    """

    label: str
    value: float | None
    text: str
    note: str = ""
    low: float | None = None
    high: float | None = None
    series: int = 0


@dataclass(frozen=True)
class Column:
    """One place on the horizontal axis: a main value, one to compare it with, and whether the place was left alone."""

    label: str
    name: str
    value: float | None
    other: float | None = None
    left_alone: bool = False


def bars(ident: str, title: str, description: str, rows: Sequence[Bar]) -> Markup:
    """Horizontal bars from zero, each under its label and its value."""
    ends = [end for row in rows for end in (row.value, row.high) if end is not None and math.isfinite(end)]
    # Room for the cap of the longest whisker.
    scale = (_BAR_WIDTH - 2) / max(ends, default=0.0) if max(ends, default=0.0) > 0 else 0.0
    body = [_bar(row, 38 * index, scale) for index, row in enumerate(rows)]
    return svg(ident, _BAR_WIDTH, 38 * len(rows), title, description, body)


def _bar(row: Bar, top: float, scale: float) -> Markup:
    room = int(_BAR_WIDTH / _CHARACTER) - len(row.text) - len(row.note) - 3
    note = tag("tspan", f" {row.note}", class_="note") if row.note else None
    parts: list[Child] = [
        tag("title", f"{row.label}: {row.text} {row.note}".rstrip()),
        tag("text", fmt.shorten(row.label, max(room, 8)), x=0, y=top + 12, class_="label"),
        tag("text", row.text, note, x=_BAR_WIDTH, y=top + 12, class_="value", text_anchor="end"),
        tag("rect", x=0, y=top + 18, width=_BAR_WIDTH, height=10, rx=2, class_="track"),
    ]
    if row.value is not None and not math.isnan(row.value):
        # An infinite value fills its track.
        width = max(row.value * scale, 0) if math.isfinite(row.value) else _BAR_WIDTH
        parts.append(tag("rect", x=0, y=top + 18, width=width, height=10, rx=2, class_=f"s{row.series % 6}"))
    if row.low is not None and row.high is not None:
        low, high, middle = row.low * scale, row.high * scale, top + 23
        path = f"M{low:.2f} {middle}H{high:.2f}M{low:.2f} {middle - 5}v10M{high:.2f} {middle - 5}v10"
        parts += [tag("path", d=path, class_="halo"), tag("path", d=path, class_="whisker")]
    return tag("g", parts)


def columns(
    ident: str, title: str, description: str, places: Sequence[Column], *, top: float, height: int = 118
) -> Markup:
    """Columns from zero up to `top`, the end of the vertical axis, so that several plots can share one scale."""
    places = _thinned(places)
    left, right, above, below = 40, 4, 8, 18
    width, depth = _COLUMNS_WIDTH - left - right, height - above - below
    ticks = axis_ticks(top)
    end = ticks[-1]
    body: list[Child] = []
    for tick in ticks:
        y = above + depth * (1 - tick / end)
        body.append(tag("path", d=f"M{left} {y:.1f}H{left + width}", class_="axis" if tick == 0 else "grid"))
        body.append(tag("text", f"{tick:g}", x=left - 6, y=y + 3.5, class_="tick", text_anchor="end"))
    slot = width / max(len(places), 1)
    paired = any(place.other is not None for place in places)
    bar = min(slot * (0.8 if slot > 4 else 1.0), 36.0) / (2 if paired else 1)
    stride = _stride(max((len(place.label) for place in places), default=0) * _CHARACTER + 8, slot)
    for index, place in enumerate(places):
        middle = left + slot * (index + 0.5)
        body.append(_column(place, middle, bar, paired, above, depth, end))
        over_the_edge = middle + len(place.label) * _CHARACTER / 2 > _COLUMNS_WIDTH
        if index % stride == 0 and not over_the_edge:
            body.append(tag("text", place.label, x=middle, y=height - 5, class_="tick", text_anchor="middle"))
    return svg(ident, _COLUMNS_WIDTH, height, title, description, body)


def _stride(needed: float, slot: float) -> int:
    """Every how manyth column can bear a label `needed` wide: 1, 2, 5, 10, 20, 50 and so on."""
    stride, factors = 1, itertools.cycle((2.0, 2.5, 2.0))
    while stride * slot < needed:
        stride = round(stride * next(factors))
    return stride


def _column(place: Column, middle: float, bar: float, paired: bool, above: float, depth: float, end: float) -> Markup:
    floor = above + depth
    parts: list[Child] = [tag("title", place.name)]
    start = middle - bar if paired else middle - bar / 2
    for offset, value, series in ((0.0, place.value, "ours"), (bar, place.other, "theirs")):
        if value is not None and not math.isnan(value):
            tall = depth * min(max(value / end, 0), 1)
            series = f"{series} alone" if place.left_alone else series
            parts.append(tag("rect", x=start + offset, y=floor - tall, width=bar, height=tall, class_=series))
    if place.left_alone and place.value is None:
        parts.append(tag("path", d=f"M{middle - 2.5:.2f} {floor - 6:.1f}l5 5m0 -5l-5 5", class_="cross"))
    return tag("g", parts)


def _thinned(places: Sequence[Column]) -> Sequence[Column]:
    """Neighbours drawn as one where there are too many: the largest of each run, so that no peak is lost."""
    run = math.ceil(len(places) / _MOST_COLUMNS)
    if run <= 1:
        return places
    merged = []
    for start in range(0, len(places), run):
        group = places[start : start + run]
        values = [place.value for place in group if place.value is not None]
        others = [place.other for place in group if place.other is not None]
        name = f"{group[0].name} … {group[-1].name} (largest of {len(group)})"
        alone = all(place.left_alone for place in group)
        merged.append(Column(group[0].label, name, max(values, default=None), max(others, default=None), alone))
    return merged


def largest(places: Sequence[Column]) -> float:
    """The largest finite value of `places`, 0 where there is none."""
    values = [value for place in places for value in (place.value, place.other)]
    return max((value for value in values if value is not None and math.isfinite(value)), default=0.0)


def axis_ticks(top: float) -> list[float]:
    """Two to five round numbers from 0 to at least `top`."""
    if not top > 0:
        return [0.0, 1.0]
    rough = top / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [float(f"{index * step:.12g}") for index in range(math.ceil(top / step - 1e-9) + 1)]


def svg(ident: str, width: int, height: int, title: str, description: str, body: Child) -> Markup:
    """A picture with a title and a description for whoever does not see it.

    Args:
        ident: unique on the page.
        width: in its own units, as is the height.
        height: at least 1 is taken.
        title: of the picture.
        description: what it shows.
        body: its elements.
    """
    return tag(
        "svg",
        tag("title", title, id=f"{ident}-title"),
        tag("desc", description, id=f"{ident}-desc"),
        body,
        viewBox=f"0 0 {width} {max(height, 1)}",
        role="img",
        aria_labelledby=f"{ident}-title {ident}-desc",
        style=f"max-width: {round(width * 1.15)}px",
    )
