"""`Pipeline`: passes in order; a failure that is a pass's fault leaves a reproducer."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from skink.errors import CalibrationError, RecipeError, RecoveryError, SkinkError
from skink.graph.dump import program_text
from skink.graph.failure import Failure
from skink.graph.passes import Context, LayerRecord, Pass
from skink.graph.program import Program, Stage
from skink.graph.progress import silent
from skink.graph.propagate import refresh
from skink.graph.reproducer import Circumstances
from skink.graph.run import PassRecord, Progress, Run
from skink.graph.snapshot import Snapshot
from skink.graph.versions import package_of
from skink.graph.windows import Windows
from skink.graph.write_reproducer import write_reproducer
from skink.settings import settings

_log = logging.getLogger("skink.limit")
# Codes of errors that are a pass's fault; every other code is of something that the user can mend.
_DEFECTS = ("VERIFY-", "REWRITE-", "DEFECT-")


def check_training_text(passes: Iterable[Pass], *, given: bool) -> None:
    """Refuse passes that train where there is no text to train on.

    Raises:
        RecoveryError: RECOVER-005.
    """
    training = [entry for entry in passes if entry.training_tokens(2) > 0]
    if training and not given:
        raise RecoveryError(
            "RECOVER-005",
            f"pass {training[0]} trains, and no text to train on was given.",
            fix="give --training FILES, or --training stdlib for Python source (in Python training=...).",
        )


@dataclass(frozen=True)
class PipelineResult:
    """What a pipeline did."""

    passes: tuple[PassRecord, ...]

    @property
    def layers(self) -> tuple[LayerRecord, ...]:
        """What was done to each weight, over all passes."""
        return tuple(layer for record in self.passes for layer in record.result.layers)


@dataclass(frozen=True)
class Attempt:
    """How far a pipeline came.

    Args:
        result: of the passes that ran well.
        error: what stopped it, or None.
        failure: the same, to be compared with another's.
        index: the place of the pass that failed.
        start: the program as it was given; None where no pass ran.
        before: the program just before the failing pass.
    """

    result: PipelineResult
    error: Exception | None = None
    failure: Failure | None = None
    index: int = 0
    start: Snapshot | None = None
    before: Snapshot | None = None


@dataclass(frozen=True)
class Pipeline:
    """Passes in order; checks when it is made that each gets the stage it needs.

    Raises:
        RecipeError: RECIPE-003 for a pass whose stage the ones before it do not reach.
    """

    passes: tuple[Pass, ...]
    start: Stage = Stage.CAPTURED

    def __post_init__(self) -> None:
        stage = self.start
        for entry in self.passes:
            if stage < entry.requires:
                raise RecipeError(
                    "RECIPE-003",
                    f"pass {entry.name} needs stage {entry.requires}, and gets {stage}.",
                    fix="put canonicalize before it." if entry.requires is Stage.CANONICAL else "change the order.",
                )
            stage = max(stage, entry.yields) if entry.yields is not None else stage

    def __str__(self) -> str:
        """The one-line form, which `skink.passes.recipe` reads back."""
        return ", ".join(str(entry) for entry in self.passes)

    def run(
        self,
        program: Program,
        *,
        calibration: Tensor | None = None,
        seed: int = 0,
        verify: int | None = None,
        progress: Progress = silent,
        padding: Tensor | None = None,
        training: Windows | None = None,
        held_out: Windows | None = None,
        original: Program | None = None,
        checkpoints: Path | None = None,
        status: Callable[[str], None] = silent,
    ) -> PipelineResult:
        """Run every pass on `program`, in place; a failure that is a pass's fault leaves a reproducer.

        Args:
            program: edited in place; `clone()` it first to keep the old one.
            calibration: token windows int64[N, T].
            seed: for random inputs of verification, and for passes.
            verify: 0, 1, 2 or 3; `SKINK_VERIFY` by default.
            progress: called with a pass's name and how much of its work is done.
            padding: which tokens of the windows are text (1) and which padding (0), int64[N, T]; None: all are text.
            training: text to train on, for passes that do.
            held_out: text that such a pass may judge by, and learns nothing from.
            original: what such a pass may learn from, in canonical form; by default the program as it is given here.
            checkpoints: folder where such a pass keeps its work, to go on from; None: nothing is kept.
            status: told now and then what such a pass is at.

        Raises:
            RecipeError: RECIPE-003 where the program has not reached the stage that the pipeline starts from.
            VerifyError: VERIFY-001, VERIFY-002.
            CalibrationError: CALIBRATION-002 where a pass needs calibration and there is none.
            RecoveryError: RECOVER-005 where a pass trains and there is no text for it.
        """
        level = settings().verify if verify is None else verify
        limit, dump = settings().rewrite_limit, settings().dump
        edits = len(program.edits)
        done = self.attempt(
            program,
            calibration=calibration,
            seed=seed,
            verify=level,
            limit=limit,
            dump=dump,
            progress=progress,
            padding=padding,
            training=training,
            held_out=held_out,
            original=original,
            checkpoints=checkpoints,
            status=status,
        )
        # Whoever cut a program short by an earlier pipeline was told then.
        if limit is not None and self.passes and len(program.edits) >= limit and (edits < limit or limit == 0):
            stopped = done.result.passes[-1].pass_ if done.result.passes else self.passes[0]
            _log.warning(
                "SKINK_REWRITE_LIMIT=%d stopped pass %s: the program stays at stage %s, and no later pass runs.",
                limit,
                stopped,
                program.stage,
            )
        if done.error is None:
            return done.result
        if not isinstance(done.error, SkinkError):
            done.error.add_note(f"in pass {self.passes[done.index]}, on this program:\n{program_text(program)}")
        if not isinstance(done.error, SkinkError) or done.error.code.startswith(_DEFECTS):
            packages = tuple(dict.fromkeys(package_of(type(entry).__module__) for entry in self.passes))
            texts = (calibration, padding, training, held_out)
            at = Circumstances(str(self), packages, self.start, done.index, seed, level, limit, *texts)
            _leave_reproducer(dump, done, at)
        raise done.error

    def attempt(
        self,
        program: Program,
        *,
        calibration: Tensor | None = None,
        seed: int = 0,
        verify: int = 2,
        limit: int | None = None,
        through: int = -1,
        dump: Path | None = None,
        progress: Progress = silent,
        padding: Tensor | None = None,
        training: Windows | None = None,
        held_out: Windows | None = None,
        original: Program | None = None,
        checkpoints: Path | None = None,
        status: Callable[[str], None] = silent,
    ) -> Attempt:
        """As `run`, but a failure in a pass or its verification is returned and leaves nothing behind.

        Args:
            program: edited in place; after a failure, as it was then.
            calibration: token windows int64[N, T].
            seed: for random inputs of verification, and for passes.
            verify: 0, 1, 2 or 3.
            limit: most edits that the program's log may hold. Once it holds so many, the pass that runs comes to its
                end without further edits and without reaching the stage that it leaves, and no other runs.
            through: the place of a pass up to which all passes run, though the limit is reached.
            dump: folder for the program's text after each pass that changed it.
            progress: called with a pass's name and how much of its work is done.
            padding: as `run`.
            training: as `run`.
            held_out: as `run`.
            original: as `run`.
            checkpoints: as `run`.
            status: as `run`.

        Raises:
            RecipeError: as `run`.
            CalibrationError: as `run`.
            RecoveryError: as `run`.
        """
        if program.stage < self.start:
            raise RecipeError(
                "RECIPE-003",
                f"the pipeline begins at stage {self.start}, and the program is at stage {program.stage}.",
                fix="put canonicalize before it.",
            )
        for entry in self.passes:
            if entry.needs_calibration and calibration is None:
                raise CalibrationError(
                    "CALIBRATION-002",
                    f"pass {entry} needs calibration text, and none was given.",
                    fix="give --calibration FILES (in Python calibration=...).",
                )
        check_training_text(self.passes, given=training is not None)
        refresh(program)
        context = Context(
            calibration,
            seed,
            padding=padding,
            training=training,
            held_out=held_out,
            original=original,
            checkpoints=checkpoints,
            status=status,
        )
        run = Run(program, context, verify, limit, dump, progress)
        records: list[PassRecord] = []
        learns = any(entry.needs_original for entry in self.passes)
        for index, entry in enumerate(self.passes):
            if learns:
                run.keep_original()
            if limit is not None and len(program.edits) >= limit and index > through:
                break
            run.remember()
            try:
                records.append(run.one(index, entry))
            except Exception as error:
                failure = Failure.of(error, entry.name)
                return Attempt(PipelineResult(tuple(records)), error, failure, index, run.start, run.before)
        return Attempt(PipelineResult(tuple(records)))


def _leave_reproducer(parent: Path | None, done: Attempt, at: Circumstances) -> None:
    """Write a reproducer and name it in the error; a failure to do so must not hide the error."""
    error, failure, start, before = done.error, done.failure, done.start, done.before
    if error is None or failure is None or start is None or before is None:
        return
    try:
        folder = write_reproducer(parent, error, failure, at, start, before)
        said = f"`skink bisect {folder}` finds the rewrite that did it, and that folder is what a report of it needs."
    except Exception as other:
        said = f"report it. No reproducer could be written: {type(other).__name__}: {other}"
    if isinstance(error, SkinkError):
        advice = "this is a defect of the pass:" if error.code.startswith("VERIFY-") else error.fix
        error.fix = f"{advice} {said}"
    else:
        error.add_note(f"If this is a defect of the pass, {said}")
