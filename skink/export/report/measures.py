"""What is measured of a model, as records of the report: sizes, perplexity, quality, speed, and what was saved.

All records are immutable and refuse unknown fields. Times are in seconds, sizes in bytes, losses in nats per token.
A number that was not measured is None; one that overflowed is infinite and is written as the string "Infinity".
"""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=0)]
Setting = str | int | float | bool | None
# A number stripped of the settings it was measured under says nothing: so settings are never empty.
Settings = Annotated[Mapping[str, Setting], Field(min_length=1)]


class Record(BaseModel):
    """The common behaviour of every part of a report."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Perplexity(Record):
    """Perplexity on held-out text. `nats` is the mean loss per token, whose exponential `value` is."""

    value: float
    nats: float
    settings: Settings


# A measure of encoders in the unit of predicted losses, so that both can stand side by side.
RELATIVE_ERROR = "Relative squared error"


class Quality(Record):
    """Another measure of quality than perplexity, as the cosine of an encoder's embeddings with the source's.

    Args:
        name: as the reader sees it.
        value: the number.
        better: whether more of it is better, or less.
        settings: what it was measured under; the same for all measures of a report that were taken together.
    """

    name: str
    value: float
    better: Literal["more", "less"]
    settings: Settings


class Rate(Record):
    """Tokens per second over the repeats of one measurement: median, slowest and fastest."""

    median: Annotated[float, Field(ge=0)]
    min: Annotated[float, Field(ge=0)]
    max: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.median <= self.max:
            raise ValueError(f"min {self.min} <= median {self.median} <= max {self.max} does not hold")
        return self


class Speed(Record):
    """Measured speed. `first_token_ms` is the median time to the first token, in milliseconds.

    The ratios are to the first form of the report, more than 1 where the number is larger than that form's. Give them
    where the measurement pairs its repeats; where they are None, the report divides the medians, provided that both
    forms were measured with equal settings.
    """

    prefill: Rate
    decode: Rate
    first_token_ms: Annotated[float, Field(ge=0)]
    settings: Settings
    prefill_ratio: float | None = None
    decode_ratio: float | None = None
    first_token_ratio: float | None = None


class Form(Record):
    """One model of the comparison; the first of a report is what the others are compared with.

    Args:
        name: as the reader sees it, for example "source (transformers)" or "skink, compressed".
        parameters: number of distinct parameters, tied ones counted once.
        linear_parameters: those of them that stand in linear layers, the output head aside.
        bytes: size of the weights as stored.
        macs_per_token: multiply-accumulates of the linear layers and of attention for one token at `context`.
        context: number of tokens attended to in `macs_per_token`.
        quality: measures in place of perplexity, or beside it.
    """

    name: str
    parameters: Count
    linear_parameters: Count
    bytes: Count
    macs_per_token: Count
    context: Count
    perplexity: Perplexity | None = None
    speed: Speed | None = None
    quality: list[Quality] = Field(default_factory=list)


class Amount(Record):
    """A number of parameters, bytes, multiply-accumulates or seconds; with its range over repeats where it has one."""

    value: Annotated[float, Field(ge=0)]
    low: float | None = None
    high: float | None = None


class Saved(Record):
    """One amount before the recipe and after it, in the same form of the model."""

    before: Amount
    after: Amount


class Saving(Record):
    """What the recipe saves in one unit.

    Args:
        unit: `params`; `bytes` as stored; `flops`: multiply-accumulates for one token; `latency`: measured seconds.
        linear: of the linear layers: all that a budget counts, without embeddings and without the output head.
        model: of the whole model.
        settings: what it was counted or measured under, where that matters.
    """

    unit: Literal["params", "bytes", "flops", "latency"]
    linear: Saved | None = None
    model: Saved | None = None
    settings: Mapping[str, Setting] = Field(default_factory=dict)
