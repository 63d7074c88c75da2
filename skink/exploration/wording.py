"""Points and their numbers as the reader of the map sees them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from skink.evaluation.answers import Accuracy, Difference, paired
from skink.evaluation.questions import KINDS
from skink.exploration.result import COSTS, QUALITIES, Exploration, PointResult
from skink.export.report import formatting as fmt

# For the heads of columns.
SHORT = {
    "parameters": "Par.",
    "linear_parameters": "Lin. par.",
    "bytes": "Bytes",
    "macs_per_token": "MACs",
    "latency": "Time/token",
    "perplexity": "Perplexity",
    "accuracy": "Accuracy",
    "tasks": "Tasks",
    "cosine": "Cosine",
    "order": "Order",
    "same": "Same choice",
}

# Names of layers and tensors beyond this many characters are cut in the middle.
_LONGEST = 90


def families(found: Exploration) -> list[str]:
    """Names of the families that have points, in the space's order."""
    return list(dict.fromkeys(point.family for point in found.points))


def series(found: Exploration, family: str) -> int:
    """The colour of a family; the first is the report's own."""
    names = families(found)
    return (2, 4, 3, 5, 1, 0)[names.index(family) % 6] if family in names else 0


def relative(found: Exploration, point: PointResult, cost: str) -> float:
    """A cost over the dense model's; NaN where it was not measured."""
    value, whole = point.metrics.get(cost, math.nan), found.dense.metrics.get(cost, math.nan)
    return value / whole if whole else math.nan


def name(point: PointResult) -> str:
    """What tells a point from others of its family."""
    if not point.family:
        return "dense"
    values = ", ".join(f"{axis}={_value(value)}" for axis, value in point.values.items())
    return fmt.shorten(values or point.recipe, _LONGEST)


def shown(metric: str, point: PointResult) -> str:
    """A quality as text: a perplexity, or a share in percent."""
    value = point.metrics.get(metric)
    if value is None:
        return fmt.MISSING
    return fmt.plain(value) if QUALITIES[metric].low else percent(value)


def percent(share: float) -> str:
    """A share: 79.8%."""
    return fmt.MISSING if math.isnan(share) else f"{100 * share:.1f}%"


def beside_dense(found: Exploration, quality: str, point: PointResult) -> str:
    """A quality beside the dense model's: a ratio of perplexities, or percentage points with their standard error."""
    value, dense = point.metrics.get(quality), found.dense.metrics.get(quality)
    if value is None or dense is None or point is found.dense:
        return fmt.MISSING
    if QUALITIES[quality].low:
        return fmt.ratio(value / dense, 4)
    difference = question_difference(found.dense, point) if quality == "accuracy" else None
    if difference is None:
        return _signed(100 * (value - dense))
    return f"{_signed(100 * difference.value)} ± {100 * difference.standard_error:.1f}"


def question_difference(dense: PointResult, point: PointResult) -> Difference | None:
    """How many more questions a point answers rightly than the dense model, question by question."""
    before, after = _answers(dense.details), _answers(point.details)
    return None if before is None or after is None else paired(before, after)


def spoken(found: Exploration, number: int) -> str:
    """All of a point in one line, for those who rest the pointer on it or cannot see it."""
    point = found.everything[number]
    parts = [f"#{number} {point.family}: {name(point)}" if number else "the dense model"]
    for quality in QUALITIES:
        if quality in point.metrics:
            beside = beside_dense(found, quality, point)
            parts.append(
                f"{QUALITIES[quality].label.lower()} {shown(quality, point)}"
                + (f" ({beside})" if beside != fmt.MISSING else "")
            )
    parts += [
        f"{COSTS[cost].label.lower()} {percent(relative(found, point, cost))}"
        for cost in COSTS
        if cost in point.metrics
    ]
    return "; ".join(parts)


def _answers(details: Mapping[str, Any]) -> Accuracy | None:
    """All questions' answers of a point as one accuracy."""
    questions = details.get("questions")
    if not isinstance(questions, Mapping):
        return None
    marks = "".join(questions[kind]["correct"] for kind in KINDS if kind in questions)
    correct = tuple(mark == "1" for mark in marks)
    share = sum(correct) / max(len(correct), 1)
    return Accuracy(share, math.nan, len(correct), correct, "all", "", "", "", 0, "", "")


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", fmt.MINUS)


def _value(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + " ".join(_value(entry) for entry in value) + "]"
    return fmt.setting(value) if isinstance(value, bool | float | None) else str(value)
