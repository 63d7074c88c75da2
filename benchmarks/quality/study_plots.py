"""Three kinds of plot as SVG text, for pages: bars in groups, a grid of numbers, and lines through points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Told apart by people who do not see all colours (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777")
_INK, _FAINT, _PAPER = "#222222", "#d0d0d0", "#ffffff"
_WIDTH, _HEIGHT = 680, 384
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 88, 48


@dataclass(frozen=True)
class Series:
    """Points of one colour, in the order in which they are joined.

    Args:
        name: in the legend.
        points: (x, y).
        joined: whether a line runs through them.
    """

    name: str
    points: Sequence[tuple[float, float]]
    joined: bool = True


def bars(title: str, labels: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], y: str) -> str:
    """Groups of bars on a logarithmic axis: for each label one bar of each series; values above 0."""
    values = [value for _, numbers in series for value in numbers]
    axis = _Axis.over(values, logarithmic=True, begin=_HEIGHT - _BOTTOM, end=_TOP)
    parts = [_title(title), _legend([name for name, _ in series]), *_horizontal(axis, y)]
    group = (_WIDTH - _LEFT - _RIGHT) / len(labels)
    wide = 0.8 * group / len(series)
    for place, label in enumerate(labels):
        left = _LEFT + (place + 0.1) * group
        parts.append(_text(_LEFT + (place + 0.5) * group, _HEIGHT - _BOTTOM + 18, label, anchor="middle"))
        for index, (_, numbers) in enumerate(series):
            top = axis.at(numbers[place])
            parts.append(
                f'<rect x="{left + index * wide:.1f}" y="{top:.1f}" width="{wide - 1:.1f}" '
                f'height="{_HEIGHT - _BOTTOM - top:.1f}" fill="{COLOURS[index]}"/>'
            )
    return _svg(_WIDTH, _HEIGHT, parts)


def grid(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    down: str = "",
    across: str = "",
) -> str:
    """A grid of numbers above 0, darker where larger, on a logarithmic scale; None leaves a cell empty."""
    cell_width, cell_height = 66, 30
    left = 28 + 8 * max(len(row) for row in rows)
    known = [math.log(value) for line in values for value in line if value is not None]
    low, high = min(known), max(known)
    parts = [_title(title), _text(left, _TOP - 24, across), _text(8, _TOP - 6, down)]
    for place, column in enumerate(columns):
        parts.append(_text(left + (place + 0.5) * cell_width, _TOP - 6, column, anchor="middle"))
    for line, row in enumerate(rows):
        top = _TOP + line * cell_height
        parts.append(_text(left - 8, top + 20, row, anchor="end"))
        for place, value in enumerate(values[line]):
            if value is None:
                continue
            share = (math.log(value) - low) / ((high - low) or 1.0)
            paint = "#" + "".join(f"{round(255 + share * (dark - 255)):02x}" for dark in (0, 80, 140))
            parts.append(
                f'<rect x="{left + place * cell_width}" y="{top}" width="{cell_width - 2}" '
                f'height="{cell_height - 2}" fill="{paint}"/>'
            )
            ink = _PAPER if share > 0.55 else _INK
            centre = left + place * cell_width + cell_width / 2 - 1
            parts.append(_text(centre, top + 19, _short(value), anchor="middle", ink=ink))
    return _svg(left + len(columns) * cell_width + 12, _TOP + len(rows) * cell_height + 12, parts)


def scatter(title: str, series: Sequence[Series], x: str, y: str) -> str:
    """Points, on an axis across that is linear and one upwards that is logarithmic; y above 0."""
    across = _Axis.over([at for each in series for at, _ in each.points], begin=_LEFT + 12, end=_WIDTH - _RIGHT - 12)
    upwards = _Axis.over(
        [at for each in series for _, at in each.points], logarithmic=True, begin=_HEIGHT - _BOTTOM, end=_TOP
    )
    parts = [_title(title), _legend([each.name for each in series]), *_horizontal(upwards, y)]
    below = _HEIGHT - _BOTTOM + 18
    parts += [_text(across.at(tick), below, _short(tick), anchor="middle") for tick in across.ticks]
    parts.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 8, x, anchor="middle"))
    for index, each in enumerate(series):
        places = [(across.at(one), upwards.at(other)) for one, other in each.points]
        if each.joined:
            path = " ".join(f"{one:.1f},{other:.1f}" for one, other in places)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[index]}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{one:.1f}" cy="{other:.1f}" r="3.5" fill="{COLOURS[index]}"/>' for one, other in places]
    return _svg(_WIDTH, _HEIGHT, parts)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], *, begin: float, end: float, logarithmic: bool = False) -> "_Axis":
        """An axis that holds the values, from the pixel `begin` to the pixel `end`."""
        if logarithmic:
            first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
            ticks = tuple(10.0**power for power in range(first, max(last, first + 1) + 1))
            return cls(ticks[0], ticks[-1], begin, end, True, ticks)
        step = 10.0 ** math.floor(math.log10((max(values) - min(values)) or 1.0))
        step *= next(scale for scale in (0.1, 0.2, 0.5, 1.0, 2.0) if (max(values) - min(values)) / step / scale <= 6)
        first, last = math.floor(min(values) / step), math.ceil(max(values) / step)
        ticks = tuple(place * step for place in range(first, last + 1))
        return cls(ticks[0], ticks[-1], begin, end, False, ticks)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        one, low, high = (math.log(each) if self.logarithmic else each for each in (value, self.low, self.high))
        return self.begin + (one - low) / (high - low) * (self.end - self.begin)


def _horizontal(axis: _Axis, label: str) -> list[str]:
    parts = [_text(8, _TOP - 12, label)]
    for tick in axis.ticks:
        at = axis.at(tick)
        parts.append(f'<line x1="{_LEFT}" y1="{at:.1f}" x2="{_WIDTH - _RIGHT}" y2="{at:.1f}" stroke="{_FAINT}"/>')
        parts.append(_text(_LEFT - 6, at + 4, _short(tick), anchor="end"))
    return parts


def _legend(names: Sequence[str]) -> str:
    """Names in rows below the title, two of which there is room for."""
    parts, left, top = [], float(_LEFT), 44
    for index, name in enumerate(names):
        width = 7 * len(name) + 26
        if left + width > _WIDTH:
            left, top = float(_LEFT), top + 16
        parts.append(f'<rect x="{left:.0f}" y="{top - 10}" width="10" height="10" fill="{COLOURS[index]}"/>')
        parts.append(_text(left + 14, top, name))
        left += width
    return "".join(parts)


def _title(text: str) -> str:
    return _text(8, 22, text, weight="600")


def _text(x: float, y: float, text: str, *, anchor: str = "start", ink: str = _INK, weight: str = "400") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{ink}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )


def _short(value: float) -> str:
    return (
        f"{value:.2g}" if 1e-3 <= abs(value) < 100 or value == 0 else f"{value:.0f}" if value >= 100 else f"{value:.0e}"
    )


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12">\n<rect width="{width}" height="{height}" '
        f'fill="{_PAPER}"/>\n{body}\n</svg>\n'
    )
