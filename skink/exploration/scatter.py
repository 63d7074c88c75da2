"""A scatter plot as inline SVG, with a Pareto front drawn through it. Lengths are in SVG user units (CSS pixels)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from skink.export.report.markup import Child, Markup, tag

_WIDTH, _HEIGHT = 360, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 6, 8, 38
# Between the ends of an axis and its outermost ticks, so that no point is cut.
_MARGIN = 14
# Numbers of points on the front are left out where they would lie on one another.
_APART = 15.0
# A logarithmic axis where the largest value is more than so many times the smallest.
_LOGARITHMIC = 1.6


@dataclass(frozen=True)
class Dot:
    """One point.

    Args:
        x: where, finite.
        y: where, finite.
        text: shown when the pointer rests on it.
        link: the fragment that a click goes to, or "".
        number: written beside it where it is on the front.
        series: picks its colour, 0 to 5.
        dense: the model without any pass, drawn as a diamond.
    """

    x: float
    y: float
    text: str
    link: str = ""
    number: str = ""
    series: int = 1
    dense: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis.

    Args:
        label: what it shows, with its unit.
        ticks: values that are marked, from one end of the axis to the other.
        logarithmic: whether equal ratios are equally long.
    """

    label: str
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1."""
        low, high = self._at(self.ticks[0]), self._at(self.ticks[-1])
        return (self._at(value) - low) / (high - low)

    def _at(self, value: float) -> float:
        return math.log(value) if self.logarithmic else value


def axis(label: str, values: Sequence[float], *, may_be_logarithmic: bool = False) -> Axis:
    """An axis over all of some finite values, its ticks round numbers."""
    low, high = min(values), max(values)
    if may_be_logarithmic and low > 0 and high > _LOGARITHMIC * low:
        return Axis(label, _logarithmic_ticks(low, high), logarithmic=True)
    return Axis(label, _linear_ticks(low, high))


def _linear_ticks(low: float, high: float) -> tuple[float, ...]:
    """Four to eight round numbers from at most `low` to at least `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - 0.05 * max(abs(low), 1e-3), high + 0.05 * max(abs(high), 1e-3)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(float(f"{index * step:.12g}") for index in range(first, last + 1))


def _logarithmic_ticks(low: float, high: float) -> tuple[float, ...]:
    """Round numbers from at most `low` to at least `high`, fewer of each decade the more of them there are."""
    decades = math.log10(high / low)
    factors = (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    every = [float(f"{factor}e{power}") for power in powers for factor in factors]
    first = max(index for index, tick in enumerate(every) if tick <= low * (1 + 1e-9))
    last = min(index for index, tick in enumerate(every) if tick >= high * (1 - 1e-9))
    ticks = every[first : last + 1]
    stride = max(1, math.ceil(len(ticks) / 8))
    # The ends stay, whatever is left out between.
    return tuple(dict.fromkeys((*ticks[:-1:stride], ticks[-1])))


def scatter(
    ident: str,
    title: str,
    description: str,
    dots: Sequence[Dot],
    front: Sequence[int],
    across: Axis,
    up: Axis,
    *,
    low: bool = True,
) -> Markup:
    """A plot of `dots` with a staircase through those whose places are in `front`, in order of `x`.

    Where `low`, less of `y` is better, and the numbers of points on the front stand below it, where no point can lie.
    """
    places = [(_x(across.share(dot.x)), _y(up.share(dot.y))) for dot in dots]
    on_front = set(front)
    body: list[Child] = [*_grid(across, up)]
    if len(front) > 1:
        body.append(tag("path", d=_staircase([places[index] for index in front]), class_="front"))
    # The front lies on top, and the dense model on top of all.
    order = sorted(range(len(dots)), key=lambda index: (index in on_front, dots[index].dense))
    body += [_dot(dots[index], *places[index], on_front=index in on_front) for index in order]
    body += _numbers([(dots[index].number, *places[index]) for index in front], 13.0 if low else -7.0)
    return tag(
        "svg",
        tag("title", title, id=f"{ident}-title"),
        tag("desc", description, id=f"{ident}-desc"),
        body,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_labelledby=f"{ident}-title {ident}-desc",
        class_="scatter",
    )


def _x(share: float) -> float:
    return _LEFT + _MARGIN + share * (_WIDTH - _LEFT - _RIGHT - 2 * _MARGIN)


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - _MARGIN - share * (_HEIGHT - _TOP - _BOTTOM - 2 * _MARGIN)


def _grid(across: Axis, up: Axis) -> list[Child]:
    parts: list[Child] = [tag("path", d=f"M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}", class_="axis")]
    for tick in up.ticks:
        y = _y(up.share(tick))
        parts.append(tag("path", d=f"M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}", class_="grid"))
        parts.append(tag("text", _written(tick), x=_LEFT - 7, y=y + 3.5, class_="tick", text_anchor="end"))
    for tick in across.ticks:
        x = _x(across.share(tick))
        parts.append(tag("path", d=f"M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}", class_="grid"))
        parts.append(tag("text", _written(tick), x=x, y=_HEIGHT - _BOTTOM + 16, class_="tick", text_anchor="middle"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(tag("text", across.label, x=middle, y=_HEIGHT - 5, class_="label", text_anchor="middle"))
    return parts


def _written(tick: float) -> str:
    if tick != 0 and not 1e-3 <= abs(tick) < 1e6:
        return f"{tick:.0e}".replace("e+0", "e").replace("e-0", "e\N{MINUS SIGN}")
    return f"{tick:,.10g}".replace("-", "\N{MINUS SIGN}")


def _staircase(places: Sequence[tuple[float, float]]) -> str:
    """From each place level to the next one's x, then up or down to it: what can be had at each cost."""
    (x, y), *others = places
    return f"M{x:.1f} {y:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in others)


def _dot(dot: Dot, x: float, y: float, *, on_front: bool) -> Markup:
    class_ = f"dot s{dot.series % 6}" + (" best" if on_front else "")
    shape = (
        tag("path", tag("title", dot.text), d=f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z", class_="dot dense")
        if dot.dense
        else tag("circle", tag("title", dot.text), cx=x, cy=y, r=5 if on_front else 4, class_=class_)
    )
    return tag("a", shape, href=f"#{dot.link}") if dot.link else shape


def _numbers(places: Sequence[tuple[str, float, float]], under: float) -> list[Child]:
    """Numbers to the left of places, `under` below their middle."""
    parts: list[Child] = []
    last: tuple[float, float] | None = None
    for number, x, y in places:
        if not number or (last is not None and math.hypot(x - last[0], y - last[1]) < _APART):
            continue
        last = (x, y)
        parts.append(tag("text", number, x=x - 7, y=y + under, class_="tick", text_anchor="end"))
    return parts
