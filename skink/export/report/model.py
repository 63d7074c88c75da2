"""The report as data: what was compressed, how, and what came of it. This is the content of `report.json`.

What was measured of each form of the model is in `skink.export.report.measures`, with the units of all numbers.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Self

from pydantic import Field, field_validator

from skink.export.report.measures import Count, Form, Record, Saving, Settings

SCHEMA_VERSION = 1


class Source(Record):
    """The model that was compressed: its hub id or folder name, and the `model_type` of its configuration."""

    name: str
    model_type: str


class Recipe(Record):
    """The resolved recipe, in the one-line form and as the YAML text of `recipe.yaml`."""

    line: str
    yaml: str


class Calibration(Record):
    """The data that calibrated the passes: `windows` windows of `window_length` tokens, drawn with `seed`."""

    source: str
    sha256: str
    windows: Count
    window_length: Count
    seed: int


class Rejection(Record):
    """A place that a pass left alone, and why."""

    where: str
    reason: str


class PassRecord(Record):
    """One pass of the recipe as it ran.

    Args:
        name, options: the pass, and the text between the braces of its one-line form ("" where all are defaults).
        seconds: wall time, verification included.
        edits: rewrites made.
        error: relative L2 error of the logits against the captured model after this pass.
        kl: mean KL divergence of the captured model's next-token distribution from this one's, nats per token.
        verified: 0 not at all, 1 structure, 2 numbers too, 3 numbers after every edit.
        skipped: places that matched in part and were left alone; `rejections` names them, perhaps not all.
        notes: what else there is to know; of a pass that trained, its `Recovery` has them.
    """

    name: str
    options: str
    seconds: Annotated[float, Field(ge=0)]
    edits: Count
    error: float | None = None
    kl: float | None = None
    verified: Annotated[int, Field(ge=0, le=3)] = 0
    skipped: Count = 0
    rejections: list[Rejection] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


class LayerRecord(Record):
    """What became of one layer.

    Args:
        name: qualified name in the source model.
        kind: "linear" or another kind of weight.
        shape: of the weight, [out, in] where it is linear.
        decision: "kept dense", or what was done to it: "factored" and the like.
        rank: the rank kept, if it has one; None for a layer kept dense.
        parameters_before, parameters_after: of this layer, bias included.
        predicted_error: relative output error, predicted from the energy that was discarded.
        weight_error: relative Frobenius error of the weight.
        baseline_error: relative output error of plain SVD at the same rank.
        reason: why it was kept dense, or "".
        predicted_loss: what the edit should add to the loss of the whole model, in the report's `loss_unit`.
        measured_loss: what this edit alone added on held-out text, in the same unit.
    """

    name: str
    kind: str = "linear"
    shape: tuple[int, ...]
    decision: str
    rank: Count | None = None
    parameters_before: Count
    parameters_after: Count
    predicted_error: float | None = None
    weight_error: float | None = None
    baseline_error: float | None = None
    reason: str = ""
    predicted_loss: float | None = None
    measured_loss: float | None = None


class Comparison(Record):
    """One method beside others at an equal share of parameters kept: a row of "by how much".

    Args:
        name: for example "plain SVD".
        keep: share of the linear layers' parameters kept; more than 1 where the method adds some.
        perplexity: on the held-out text that `settings` names.
        ratio_to_dense: that perplexity over the uncompressed model's.
    """

    name: str
    keep: Annotated[float, Field(ge=0)]
    perplexity: float
    ratio_to_dense: float
    settings: Settings


class Recovery(Record):
    """One pass that trained, and how it went.

    Args:
        name: the pass in the one-line form.
        trained: how many numbers trained.
        loss: the terms of the loss, with their weights.
        settings: every option it trained with.
        text, sha256: what it was trained on.
        steps, tokens, seconds: how long; tokens are those of text read, padding excluded.
        processes: how many trained together.
        losses: (tokens read, mean loss since the point before) along the way.
        held_out: (tokens read, held-out loss) at each evaluation: the cross-entropy in nats per token where that is a
            term, and else the loss.
        before, after: held-out loss of the weights at first, and of those that stayed.
        stopped_early: whether it ended because the held-out loss no longer fell.
        resumed_at: step of the checkpoint that it went on from; None where it began anew.
        notes: what else there is to know.
    """

    name: str
    trained: Count
    loss: Mapping[str, float]
    settings: Settings
    text: str = ""
    sha256: str = ""
    steps: Count
    tokens: Count
    seconds: Annotated[float, Field(ge=0)]
    processes: Annotated[int, Field(ge=1)] = 1
    losses: list[tuple[int, float]] = Field(default_factory=list)
    held_out: list[tuple[int, float]] = Field(default_factory=list)
    before: float | None = None
    after: float | None = None
    stopped_early: bool = False
    resumed_at: int | None = None
    notes: list[str] = Field(default_factory=list)


class Report(Record):
    """All that `skink compress` says about one result.

    Args:
        created: ISO 8601 time.
        dtype: of the weights as stored.
        machine: cpu, cores, threads, memory, os, device and the like, as text.
        versions: of python, torch, transformers and the like.
        seed: of everything random in the run.
        forms: the models compared, the first one being the reference.
        savings: what the recipe saves, in every unit at once: the one meaning of "20% smaller".
        loss_unit: of the layers' losses, in words that go after a number.
        notes: sentences that the reader must not miss.
    """

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    skink_version: str
    created: str
    source: Source
    title: str
    recipe: Recipe
    calibration: Calibration | None = None
    dtype: str
    machine: Mapping[str, str] = Field(default_factory=dict)
    versions: Mapping[str, str] = Field(default_factory=dict)
    seed: int
    forms: list[Form] = Field(default_factory=list)
    savings: list[Saving] = Field(default_factory=list)
    passes: list[PassRecord] = Field(default_factory=list)
    layers: list[LayerRecord] = Field(default_factory=list)
    comparisons: list[Comparison] = Field(default_factory=list)
    recoveries: list[Recovery] = Field(default_factory=list)
    loss_unit: str = "nats per token"
    notes: list[str] = Field(default_factory=list)

    @field_validator("created")
    @classmethod
    def _is_a_time(cls, created: str) -> str:
        datetime.fromisoformat(created)
        return created

    def to_json(self) -> str:
        """The text of `report.json`: the same report gives the same text."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The report that `to_json` wrote.

        Raises:
            pydantic.ValidationError: text that is not JSON, or not a report of this schema.
        """
        return cls.model_validate_json(text)
