"""What came of an exploration: every point, the fronts, and all that the numbers depend on."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from skink.exploration.front import pareto_front

JSON_FILE, HTML_FILE = "explore.json", "explore.html"


@dataclass(frozen=True)
class Metric:
    """Something that is measured of a point.

    Args:
        label: as plots name it.
        low: whether less of it is better.
    """

    label: str
    low: bool


# In the order in which they are shown; those of quality first, then those of cost.
QUALITIES: dict[str, Metric] = {
    "perplexity": Metric("Perplexity", low=True),
    "accuracy": Metric("Multiple-choice accuracy", low=False),
    "tasks": Metric("Mean accuracy on lm-eval tasks", low=False),
    "cosine": Metric("Cosine to dense embeddings", low=False),
    "order": Metric("Rank correlation of retrieval", low=False),
    "same": Metric("Same first choice as dense", low=False),
}
COSTS: dict[str, Metric] = {
    "parameters": Metric("Parameters", low=True),
    "linear_parameters": Metric("Parameters of linear layers", low=True),
    "bytes": Metric("Bytes", low=True),
    "macs_per_token": Metric("Multiply-accumulates per token", low=True),
    "latency": Metric("Time per token", low=True),
}


@dataclass(frozen=True)
class PointResult:
    """One point as measured.

    Args:
        family: empty for the dense model.
        values: of the family's axes.
        recipe: the line that makes it, with every option.
        metrics: by the names of `QUALITIES` and `COSTS`; those that were not measured are missing. `latency` is the
            time per token over the dense model's, measured in turns.
        details: what the metrics were made of: standard errors, speeds, predicted loss, seconds.
        error: code, what, why and fix, where the point failed; then there are no metrics.
    """

    family: str
    values: Mapping[str, Any]
    recipe: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Exploration:
    """A design space as it was measured on one model.

    Args:
        model: name, model_type, fingerprint.
        space: name, description, and its YAML.
        settings: data with hashes, workload, seed, dtype, device.
        machine: what ran it.
        versions: of the packages that matter.
        created: when, ISO 8601.
        dense: the model without any pass.
        points: in the space's order.
    """

    model: Mapping[str, str]
    space: Mapping[str, str]
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    created: str
    dense: PointResult
    points: tuple[PointResult, ...]

    @property
    def everything(self) -> tuple[PointResult, ...]:
        """The dense model first, then the points: what fronts count."""
        return (self.dense, *self.points)

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics that the dense model has, in the order of `QUALITIES` and `COSTS`."""
        return tuple(name for name in (*QUALITIES, *COSTS) if name in self.dense.metrics)

    def front(self, quality: str, cost: str) -> tuple[int, ...]:
        """Places in `everything` of the points that no other beats in both, in order of cost."""
        sign = 1.0 if QUALITIES[quality].low else -1.0
        return tuple(
            pareto_front(
                [
                    (point.metrics.get(cost, math.nan), sign * point.metrics.get(quality, math.nan))
                    for point in self.everything
                ]
            )
        )

    def fronts(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Every quality's front against every cost that was measured."""
        names = self.measured
        return {
            quality: {cost: self.front(quality, cost) for cost in COSTS if cost in names}
            for quality in QUALITIES
            if quality in names
        }

    def to_json(self) -> str:
        """All of it as JSON; NaN and infinity as text, points with their number in the fronts."""
        content = asdict(self)
        content["dense"]["number"] = 0
        for number, point in enumerate(content["points"], 1):
            point["number"] = number
        content["fronts"] = self.fronts()
        return json.dumps(_finite(content), indent=1) + "\n"

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write `explore.json` and `explore.html` into a folder that exists, each whole or not at all."""
        from skink.exploration.page import page

        for name, text in ((JSON_FILE, self.to_json()), (HTML_FILE, page(self))):
            part = Path(folder) / f".{name}.part"
            part.write_text(text, encoding="utf-8")
            os.replace(part, Path(folder) / name)


def _finite(value: Any) -> Any:
    """`value` with infinities and NaNs as text: JSON has no numbers for them."""
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
