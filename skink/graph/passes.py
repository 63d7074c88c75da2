"""What a pass is: a frozen dataclass whose fields are its options."""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor, fx

from skink.errors import CalibrationError, OptionError, suggest
from skink.graph.analyses import Analyses, Analysis
from skink.graph.pattern import NoMatch
from skink.graph.program import Program, Stage
from skink.graph.progress import silent
from skink.graph.rewriter import Rewriter
from skink.graph.windows import Windows

T = TypeVar("T")


class Progress(Protocol):
    """Where a pass says how far it has come."""

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` units of work are done."""


# Numbers that YAML takes for text: 1e-6, inf, nan.
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?[eE][+-]?\d+|inf|infinity|nan)", re.IGNORECASE)
# Words that YAML does not read as text.
_YAML_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "null", "y", "n"})


@dataclass(frozen=True)
class Context:
    """What a pipeline gives its passes.

    Args:
        calibration: token windows int64[N, T], or None where the user gave none.
        seed: for anything random.
        progress: to be called now and then by passes that take long.
        analyses: answers that passes before this one were given and that hold still.
        padding: which tokens of the windows are text (1) and which padding (0), int64[N, T]; None: all are text.
        training: text to train on; None where the user gave none.
        held_out: text that no pass learns from, which passes may only judge by.
        original: the program as the pipeline was given it, or the teacher that the user named; not to be edited.
        checkpoints: folder for what a pass that takes long keeps of its work, to go on from; None: nothing is kept.
        status: to be told, beside `progress`, what a pass that takes long is at, in a few words.
    """

    calibration: Tensor | None = None
    seed: int = 0
    progress: Progress = silent
    analyses: Analyses = field(default_factory=Analyses)
    padding: Tensor | None = None
    training: Windows | None = None
    held_out: Windows | None = None
    original: Program | None = None
    checkpoints: Path | None = None
    status: Callable[[str], None] = silent

    def calibration_for(self, asker: str) -> Tensor:
        """The windows to calibrate on.

        Raises:
            CalibrationError: CALIBRATION-002 where there are none.
        """
        if self.calibration is None:
            raise CalibrationError(
                "CALIBRATION-002",
                f"{asker} needs calibration text, and none was given.",
                fix="give --calibration FILES (in Python calibration=...).",
            )
        return self.calibration

    def analysis(self, analysis: Analysis[T], program: Program) -> T:
        """The answer to a question about `program` as it is now: `context.analysis(Cost(), program)`."""
        return self.analyses.get(analysis, program, self)


@dataclass(frozen=True)
class LayerRecord:
    """What a pass did, or refused to do, to one weight: a row of the report.

    Errors are relative: predicted_error of the layer's output on calibration data, weight_error of the weight
    (Frobenius), baseline_error of the output with the simplest method at the same rank. predicted_loss is what the edit
    should add to the loss of the whole model, in the unit of `skink.graph.objective.loss_unit`.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    decision: str
    parameters_before: int
    parameters_after: int
    rank: int | None = None
    predicted_error: float | None = None
    weight_error: float | None = None
    baseline_error: float | None = None
    reason: str = ""
    predicted_loss: float | None = None


@dataclass(frozen=True)
class PassResult:
    """What a pass did: how many edits, which matches it refused and why, and what it did to each weight.

    `training` is what a pass that trains did: the fields of `skink.export.report.Recovery`, as plain values.
    """

    edits: int
    refused: tuple[NoMatch, ...] = ()
    layers: tuple[LayerRecord, ...] = ()
    notes: tuple[str, ...] = ()
    training: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Pass:
    """A change to a model. Subclass as a frozen dataclass; fields are options, with defaults.

    Class attributes:
        name: kebab-case, unique.
        summary: one line for `skink passes`.
        requires: the least stage that it takes.
        yields: the stage that it leaves; None leaves the stage as it was.
        exactness: `exact` passes change numbers by rounding only, and are held to that.
        preserves: names of analyses whose answers hold still after this pass's edits.
        needs_calibration: whether it cannot run without calibration text.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    requires: ClassVar[Stage] = Stage.CANONICAL
    yields: ClassVar[Stage | None] = None
    exactness: ClassVar[Literal["exact", "approximate"]] = "exact"
    preserves: ClassVar[frozenset[str]] = frozenset()

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        """Edit `program` through `rewriter`."""
        raise NotImplementedError

    @property
    def needs_calibration(self) -> bool:
        """Whether these options cannot run without calibration text."""
        return False

    @property
    def needs_original(self) -> bool:
        """Whether these options cannot run without the program that the pipeline was given."""
        return False

    def check_start(self, program: Program, original: Program) -> None:
        """Refuse a model, or an original to learn from, that it cannot work with: both canonical, as they are before
        any pass of a recipe has run, so that hours are not spent in vain. Weights may be on the meta device."""

    def training_tokens(self, length: int) -> int:
        """Tokens of training text that it reads, in windows of so many tokens; 0 for a pass that does not train."""
        return 0

    def applies(self, option: str) -> bool:
        """Whether an option says anything, given the others; what does not is left out of `describe`."""
        return True

    def resolved(self) -> Self:
        """The same pass, with options that others decide about where they are left open written out."""
        return self

    def options(self) -> dict[str, Any]:
        """All options by name."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}

    def describe(self) -> str:
        """The one-line form with every option that is set, defaults too: `low-rank{keep=0.8,method=whitened}`."""
        whole = self.resolved()
        options = [
            f"{entry.name}={_option_text(value)}"
            for entry in dataclasses.fields(self)
            if self.applies(entry.name)
            if (value := getattr(whole, entry.name)) not in ((), None) or value != entry.default
        ]
        return f"{self.name}{{{','.join(options)}}}" if options else self.name

    def __str__(self) -> str:
        """The one-line form, with the options that differ from their defaults: `low-rank{keep=0.8}`."""
        changed = [
            f"{entry.name}={_option_text(getattr(self, entry.name))}"
            for entry in dataclasses.fields(self)
            if getattr(self, entry.name) != entry.default
        ]
        return f"{self.name}{{{','.join(changed)}}}" if changed else self.name

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """A pass from options as they stand in a recipe, with their types checked.

        Raises:
            OptionError: OPTION-001 unknown, -003 wrong type; a pass itself raises -002 for ranges.
        """
        hints = typing.get_type_hints(cls)
        valid = [entry.name for entry in dataclasses.fields(cls)]
        checked: dict[str, Any] = {}
        for key, value in options.items():
            if key not in valid:
                raise OptionError("OPTION-001", f"{cls.name} has no option {key!r}.", fix=suggest(str(key), valid))
            checked[key] = _checked(f"{cls.name}.{key}", value, hints[key])
        return cls(**checked)


def _option_text(value: Any) -> str:
    """The text that `skink.passes.recipe` reads back as `value`."""
    if isinstance(value, tuple):
        return "[" + ",".join(_option_text(entry) for entry in value) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    # Text that could be read as something else, or that has marks of the one-line form in it, goes in quotes.
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_][\w./*-]*", value):
        return json.dumps(value)
    if isinstance(value, str) and value.lower() in _YAML_WORDS:
        return json.dumps(value)
    return str(value)


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` as the option's type, or OPTION-003."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        *others, last = (argument for argument in arguments if argument is not type(None))
        for other in others:
            with suppress(OptionError):
                return _checked(name, value, other)
        return _checked(name, value, last)
    if origin is Literal:
        if value in arguments:
            return value
        raise OptionError(
            "OPTION-003",
            f"{name}={value!r} is none of its choices.",
            fix=suggest(str(value), [str(a) for a in arguments]),
        )
    if origin is tuple:
        entries = value if isinstance(value, list | tuple) else [value]
        if arguments[-1] is not ...:
            return _checked_each(name, entries, arguments)
        return tuple(_checked(name, entry, arguments[0]) for entry in entries)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    if isinstance(value, hint) and not (hint is not bool and isinstance(value, bool)):
        return value
    raise OptionError(
        "OPTION-003",
        f"{name}={value!r} is a {type(value).__name__}, not a {hint.__name__}.",
        fix=f"give a {hint.__name__}.",
    )


def _checked_each(name: str, entries: Sequence[Any], hints: Sequence[Any]) -> tuple[Any, ...]:
    """A tuple of one entry for each type."""
    if len(entries) != len(hints):
        raise OptionError(
            "OPTION-003", f"{name}={list(entries)!r} has {len(entries)} entries.", fix=f"give {len(hints)} of them."
        )
    return tuple(_checked(name, entry, hint) for entry, hint in zip(entries, hints, strict=True))


def linear_weight(program: Program, node: fx.Node) -> str | None:
    """The name of the weight of a linear layer, where `node` is one whose weight is stored (not computed)."""
    if node.target is not torch.ops.aten.linear.default:
        return None
    weight = node.args[1]
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None
