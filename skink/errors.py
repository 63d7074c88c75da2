"""Errors for the user: what, where, why and how to mend, with a stable code.

Every error that a user can meet is a `SkinkError` whose code stands in `CODES` and in docs/errors.md; a test holds the
three together.
"""

from collections.abc import Sequence
from difflib import get_close_matches

CODES: dict[str, str] = {
    "CAPTURE-001": "two example inputs share memory",
    "CAPTURE-002": "torch.export could not capture the model",
    "CAPTURE-003": "an attention mask of a kind that Skink does not know",
    "CAPTURE-004": "the model is neither a decoder nor an encoder that takes token ids",
    "CAPTURE-005": "example inputs do not fit the model or the named dims",
    "CAPTURE-006": "a model that draws random numbers",
    "GRAPH-001": "a serialized graph is damaged, too new, or names an operator that is not allowed",
    "GRAPH-002": "a program was run with weights that live on the meta device",
    "GRAPH-003": "a program was called with inputs that are not its own",
    "OPTION-001": "an unknown option",
    "OPTION-002": "an option out of its range",
    "OPTION-003": "an option of the wrong type",
    "RECIPE-001": "an unknown pass",
    "RECIPE-002": "a recipe that cannot be read",
    "RECIPE-003": "a pass that needs a stage which the one before it does not leave",
    "RECIPE-004": "a pass whose package cannot be imported",
    "SPACE-001": "a design space that is unknown or cannot be read",
    "SPACE-002": "an axis, a placeholder or a condition that a design space cannot use",
    "SPACE-003": "a point of a design space that is no recipe",
    "SPACE-004": "a design space with no points for a model, or with too many",
    "SPACE-005": "an output folder with results of another model",
    "SPACE-006": "a worker process that died",
    "TASK-001": "an lm-eval task that cannot be run",
    "REWRITE-001": "rules that undo each other without end",
    "VERIFY-001": "a graph that breaks the rules of its stage after a pass",
    "VERIFY-002": "numbers changed by a pass that promised not to change them",
    "BISECT-001": "nothing to bisect: a check that fails without edits, or passes with all of them",
    "REPRO-001": "a reproducer folder that cannot be read, or whose passes are not here",
    "STATE-001": "an operator that mixes tokens in a way Skink cannot step",
    "STATE-002": "an operator that mixes tokens, or is not known not to, and declares no state",
    "BUDGET-001": "a budget that even the cheapest choices exceed",
    "CALIBRATION-001": "calibration text that gives no tokens, or too few",
    "CALIBRATION-002": "calibration needed and none given",
    "CALIBRATION-003": "calibration statistics that are not finite",
    "CALIBRATION-004": "calibration data that does not fit the model's inputs",
    "RECOVER-001": "nothing to train",
    "RECOVER-002": "training text that holds held-out text",
    "RECOVER-003": "training whose loss or gradient is not finite",
    "RECOVER-004": "checkpoints of training that cannot be read",
    "RECOVER-005": "a pass that trains, and no text for it",
    "RECOVER-006": "a teacher that does not fit the student",
    "RECOVER-007": "no place where teacher and student could be compared",
    "RECOVER-008": "training text that cannot be used",
    "RECOVER-009": "something said of training, and no pass that makes use of it",
    "RECOVER-010": "a trained weight that its dtype cannot hold",
    "RECOVER-011": "an adapter on a weight that something else reads too",
    "MODEL-001": "a folder or name that is not a checkpoint",
    "MODEL-002": "a damaged or incomplete weights file",
    "MODEL-003": "a checkpoint that needs code or pickles to load",
    "MODEL-004": "a model that hands back no cache, so that it cannot be stepped",
    "MODEL-005": "something asked of a Skink model that a graph cannot do",
    "EXPORT-001": "an operator without an ONNX form",
    "EXPORT-002": "the exported graph computes something else than the model",
    "EXPORT-003": "ONNX Runtime cannot load or run the exported graph",
    "OUTPUT-001": "an output folder that exists already",
    "OUTPUT-002": "no space left, or no right to write, at the output folder",
    "INPUT-001": "a file that cannot be read",
    "USAGE-001": "a command line that cannot be read",
    "INTERRUPT-001": "interrupted by the user",
    "DEFECT-001": "an exception that Skink should not have let out",
}


class SkinkError(Exception):
    """An error for the user.

    Args:
        code: a key of `CODES`.
        what: one sentence; received values are quoted with the range expected.
        where: node, qualified name and source line, as far as known.
        why: the cause, or every rejection with its reason.
        fix: what to do next.
    """

    def __init__(self, code: str, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        if code not in CODES:
            raise KeyError(f"error code {code!r} is not in skink.errors.CODES")
        super().__init__(what)
        self.code, self.what, self.where, self.why, self.fix = code, what, where, why, fix

    def __str__(self) -> str:
        lines = [f"[{self.code}] {self.what}"]
        if self.where:
            lines.append(f"  at {self.where}")
        if self.why:
            lines.append("  " + self.why.strip().replace("\n", "\n  "))
        lines.append(
            f"  fix: {self.fix} docs/errors.md#{self.code.lower()}"
            if self.fix
            else f"  see docs/errors.md#{self.code.lower()}"
        )
        return "\n".join(lines)

    def as_json(self) -> dict[str, str]:
        """The error's parts, for `--json` output."""
        return {"code": self.code, "what": self.what, "where": self.where, "why": self.why, "fix": self.fix}


class CaptureError(SkinkError):
    """The model could not be captured as a graph."""


class GraphError(SkinkError):
    """A graph file or a program that cannot be used."""


class OptionError(SkinkError, ValueError):
    """An option that a pass or a command refuses."""


class RangeError(OptionError):
    """An option out of its range.

    Args:
        name: the option's.
        value: received.
        interval: expected, as `[0, 1)`.
    """

    def __init__(self, name: str, value: float, interval: str) -> None:
        fix = f"choose {name} in {interval}."
        super().__init__("OPTION-002", f"{name}={value!r} is out of range {interval}.", fix=fix)
        self.name, self.value, self.interval = name, value, interval

    def of(self, owner: str) -> "RangeError":
        """The same of an option of `owner`, which the one who refused it did not know."""
        return RangeError(f"{owner}.{self.name}", self.value, self.interval)


class RecipeError(SkinkError, ValueError):
    """A recipe that cannot be read or ordered."""


class SpaceError(SkinkError, ValueError):
    """A design space that cannot be explored."""


class TaskError(SkinkError):
    """A task of another package's evaluation that cannot be run."""


class RewriteError(SkinkError):
    """Rules that cannot be applied to the end."""


class VerifyError(SkinkError):
    """A pass left a graph that is not legal, or changed numbers it should not change."""


class BisectError(SkinkError):
    """A failure that no search among edits can find."""


class ReproducerError(SkinkError):
    """A reproducer folder that cannot be used."""


class StateError(SkinkError):
    """A graph whose step form cannot be derived."""


class BudgetError(SkinkError):
    """A budget that cannot be met."""


class CalibrationError(SkinkError):
    """Calibration data that cannot be used."""


class RecoveryError(SkinkError):
    """A model that cannot be trained, or not on what was given."""


class ModelError(SkinkError):
    """A checkpoint that cannot be loaded."""


class OutputError(SkinkError):
    """A place that cannot be written."""


class InputError(SkinkError):
    """An input file that cannot be read."""


class ExportError(SkinkError):
    """A result that could not be exported, or that failed its check."""


def suggest(name: str, valid: Sequence[str]) -> str:
    """A sentence that lists the valid names and suggests the nearest one to `name`."""
    near = get_close_matches(name, valid, n=1, cutoff=0.5)
    listed = ", ".join(valid) if valid else "none"
    return (f"did you mean {near[0]!r}? " if near else "") + f"valid: {listed}."


def check_range(
    name: str, value: float, *, low: float, high: float, open_low: bool = False, open_high: bool = False
) -> None:
    """Raise OPTION-002 unless `value` lies between `low` and `high` (ends excluded where `open_*`)."""
    inside = (value > low if open_low else value >= low) and (value < high if open_high else value <= high)
    if isinstance(value, bool) or not inside:
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise RangeError(name, value, interval)
