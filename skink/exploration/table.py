"""The table of all points, which the reader sorts by any column without a script.

Each row carries its place by every column, as CSS variables. A column's head has two radio buttons, and the one that is
checked chooses the variable that rows are ordered by.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from skink.exploration.result import COSTS, QUALITIES, Exploration, PointResult
from skink.exploration.wording import SHORT, beside_dense, name, percent, relative, shown
from skink.export.report.markup import Child, Markup, tag

_WIDTHS = {"values": "minmax(150px, 1fr)", "family": "minmax(88px, 120px)", "fronts": "minmax(40px, 90px)"}


@dataclass(frozen=True)
class _Column:
    """One column: its head, what it shows, and what it is sorted by."""

    head: str
    text: Callable[[int, PointResult], Child]
    key: Callable[[int, PointResult], float | str]
    class_: str | None = None


def point_table(found: Exploration) -> tuple[Markup, str]:
    """The table, and the CSS that sorts it."""
    points = [(number, point) for number, point in enumerate(found.everything) if point.error is None]
    fronts = _fronts(found)
    columns = _columns(found, fronts)
    places = [_places([column.key(*point) for point in points]) for column in columns]
    rows = [
        tag(
            "tr",
            [
                tag(
                    "td" if index else "th",
                    column.text(number, point),
                    class_=column.class_,
                    role="cell" if index else "rowheader",
                )
                for index, column in enumerate(columns)
            ],
            id=f"p{number}",
            role="row",
            class_="best" if number in fronts else None,
            title=point.recipe or "the dense model",
            style=";".join(f"--o{index}:{places[index][row]}" for index in range(len(columns))),
        )
        for row, (number, point) in enumerate(points)
    ]
    head = tag(
        "thead",
        tag("tr", [_head(index, column) for index, column in enumerate(columns)], role="row"),
        role="rowgroup",
    )
    caption = (
        "Costs are shares of the dense model's. Front: no point is better at no higher size (S), multiply-accumulates "
        "(M) or time (T), by perplexity (P), accuracy (A) or what else was measured. Sort by the arrows."
    )
    grid = " ".join(_WIDTHS.get(column.class_ or "", "max-content") for column in columns)
    table = tag(
        "table",
        tag("caption", caption),
        head,
        tag("tbody", rows, role="rowgroup"),
        class_="points",
        role="table",
        style=f"grid-template-columns: {grid}",
    )
    return tag("div", table, class_="scroll"), _sorting(len(columns))


def _columns(found: Exploration, fronts: dict[int, str]) -> list[_Column]:
    columns = [
        _Column("#", lambda number, point: str(number), lambda number, point: number),
        _Column("Family", lambda number, point: point.family or "dense", lambda number, point: point.family, "family"),
        _Column("Point", lambda number, point: name(point), lambda number, point: name(point), "values"),
    ]
    for quality in QUALITIES:
        if quality in found.measured:
            columns += _quality_columns(found, quality)
    columns += [_cost_column(found, cost) for cost in COSTS if cost in found.measured]
    columns.append(
        _Column(
            "Front",
            lambda number, point: fronts.get(number, ""),
            lambda number, point: -len(fronts.get(number, "")),
            "fronts",
        )
    )
    return columns


def _quality_columns(found: Exploration, quality: str) -> list[_Column]:
    low = QUALITIES[quality].low

    def key(number: int, point: PointResult) -> float:
        value = point.metrics.get(quality, math.nan)
        return value if low else -value

    return [
        _Column(SHORT[quality], lambda number, point: shown(quality, point), key),
        _Column("of dense" if low else "beside dense", lambda number, point: beside_dense(found, quality, point), key),
    ]


def _cost_column(found: Exploration, cost: str) -> _Column:
    def key(number: int, point: PointResult) -> float:
        return relative(found, point, cost)

    return _Column(SHORT[cost], lambda number, point: percent(key(number, point)), key)


def _fronts(found: Exploration) -> dict[int, str]:
    """Which fronts each point is on: `P: SM, A: S`, each quality by its first letter."""
    letters = {"linear_parameters": "S", "macs_per_token": "M", "latency": "T"}
    marks: dict[int, dict[str, str]] = {}
    for quality, costs in found.fronts().items():
        for cost, numbers in costs.items():
            for number in numbers:
                if cost in letters:
                    on = marks.setdefault(number, {})
                    on[quality] = on.get(quality, "") + letters[cost]
    several = len(found.fronts()) > 1
    return {
        number: ", ".join(f"{SHORT[quality][0]}: {on}" if several else on for quality, on in entry.items())
        for number, entry in marks.items()
    }


def _head(index: int, column: _Column) -> Markup:
    arrows = [
        tag(
            "label",
            tag(
                "input",
                type="radio",
                name="sort",
                id=f"sort-{index}-{direction}",
                aria_label=f"sort by {column.head}, {said}",
                checked="checked" if (index, direction) == (0, "up") else None,
            ),
            arrow,
        )
        for direction, arrow, said in (("up", "↑", "best or first on top"), ("down", "↓", "worst or last on top"))
    ]
    return tag(
        "th", column.head, tag("span", arrows, class_="sort"), scope="col", role="columnheader", class_=column.class_
    )


def _sorting(columns: int) -> str:
    lines = []
    for index in range(columns):
        for direction, order in (("up", f"var(--o{index})"), ("down", f"calc(0 - var(--o{index}))")):
            lines.append(f"main:has(#sort-{index}-{direction}:checked) .points tbody tr {{ order: {order}; }}")
    return "\n" + "\n".join(lines) + "\n"


def _places(keys: Sequence[float | str]) -> list[int]:
    """The place of each key in order, NaNs last."""

    def sortable(index: int) -> tuple[bool, float, str, int]:
        key = keys[index]
        if isinstance(key, str):
            return False, 0.0, key, index
        return math.isnan(key), 0.0 if math.isnan(key) else key, "", index

    places = [0] * len(keys)
    for place, index in enumerate(sorted(range(len(keys)), key=sortable)):
        places[index] = place
    return places
