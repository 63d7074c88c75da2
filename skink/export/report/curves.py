"""Curves as inline SVG, on an axis that need not begin at zero. Lengths are in SVG user units."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from skink.export.report import formatting as fmt
from skink.export.report.markup import Child, Markup, tag
from skink.export.report.plots import svg

_WIDTH, _HEIGHT = 500, 190
_LEFT, _RIGHT, _ABOVE, _BELOW = 46, 8, 8, 34
# More points of one curve than this would lie closer than a pixel.
_MOST_POINTS = 450


@dataclass(frozen=True)
class Line:
    """One curve: its points in order, and the class that colours it; `dots` marks each point."""

    name: str
    points: Sequence[tuple[float, float]]
    class_: str
    dots: bool = False


def curves(ident: str, title: str, description: str, lines: Sequence[Line], across: str) -> Markup | None:
    """A plot of curves over one axis, `across` below it; None where no point is finite."""
    found = [point for line in lines for point in line.points if all(map(math.isfinite, point))]
    if not found:
        return None
    right = max(max(x for x, _ in found), 1e-12)
    ticks = ticks_between(min(y for _, y in found), max(y for _, y in found))
    low, high = ticks[0], ticks[-1]
    width, depth = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _ABOVE - _BELOW

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + width * x / right, _ABOVE + depth * (high - y) / (high - low)

    body: list[Child] = []
    for index, tick in enumerate(ticks):
        y = place(0, tick)[1]
        body.append(tag("path", d=f"M{_LEFT} {y:.1f}H{_LEFT + width}", class_="grid" if index else "axis"))
        body.append(tag("text", f"{tick:g}", x=_LEFT - 6, y=y + 3.5, class_="tick", text_anchor="end"))
    for share in (0.0, 0.5, 1.0):
        anchor = ("start", "middle", "end")[round(2 * share)]
        x = _LEFT + width * share
        body.append(
            tag("text", fmt.count(right * share), x=x, y=_HEIGHT - 19, class_="tick", text_anchor=anchor),
        )
    body.append(
        tag("text", across, x=_LEFT + width / 2, y=_HEIGHT - 4, class_="tick", text_anchor="middle"),
    )
    body += [_curve(line, place) for line in lines]
    return svg(ident, _WIDTH, _HEIGHT, title, description, body)


def _curve(line: Line, place: Callable[[float, float], tuple[float, float]]) -> Markup:
    finite = [place(x, y) for x, y in thinned(line.points) if math.isfinite(x) and math.isfinite(y)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in finite) if len(finite) > 1 else None
    marks = [tag("circle", cx=x, cy=y, r=3) for x, y in finite] if line.dots or len(finite) == 1 else []
    drawn = tag("path", d=path) if path else None
    return tag("g", tag("title", line.name), drawn, marks, class_=f"curve {line.class_}")


def thinned(points: Sequence[tuple[float, float]], most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means over neighbours, each where its last one lies, so that no end is lost."""
    if len(points) <= most:
        return list(points)
    bounds = [round(index * len(points) / most) for index in range(most + 1)]
    groups = [points[start:end] for start, end in pairwise(bounds)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def ticks_between(low: float, high: float) -> list[float]:
    """Three to six round numbers that begin at most at `low` and end at least at `high`."""
    span = high - low
    if not span > 1e-9 * max(abs(low), abs(high), 1e-9):
        span = max(abs(high), 1e-3) * 0.1
        low, high = low - span / 2, high + span / 2
    rough = span / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]
