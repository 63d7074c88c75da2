"""`Pipeline`: passes in order, each verified, timed, logged, and dumped where it changed something."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from skink.errors import CalibrationError, RecipeError, SkinkError
from skink.graph.passes import Context, LayerRecord, Pass, PassResult
from skink.graph.program import Program, Stage
from skink.graph.propagate import refresh
from skink.graph.rewriter import Rewriter, describe
from skink.graph.text import print_program
from skink.graph.verifier import Numbers, check_exact, check_structure, compare, seeded_inputs
from skink.settings import settings


@dataclass(frozen=True)
class PassRecord:
    """What one pass did, how long it took, and how the program's results differ from the captured model's after it."""

    pass_: Pass
    result: PassResult
    seconds: float
    verified: int
    numbers: Numbers | None

    def rejections(self) -> list[tuple[str, str]]:
        """(where, reason) of every match that a rule refused."""
        return [(describe(entry.node), entry.reason) for entry in self.result.refused]


@dataclass(frozen=True)
class PipelineResult:
    """What a pipeline did."""

    passes: tuple[PassRecord, ...]

    @property
    def layers(self) -> tuple[LayerRecord, ...]:
        """What was done to each weight, over all passes."""
        return tuple(layer for record in self.passes for layer in record.result.layers)


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
        progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    ) -> PipelineResult:
        """Run every pass on `program`, in place.

        Args:
            program: edited in place; `clone()` it first to keep the old one.
            calibration: token windows int64[N, T].
            seed: for random inputs of verification, and for passes.
            verify: 0, 1 or 2; `SKINK_VERIFY` by default.
            progress: called with a pass's name and how much of its work is done.

        Raises:
            RecipeError: RECIPE-003 where the program has not reached the stage that the pipeline starts from.
            VerifyError: VERIFY-001, VERIFY-002.
            CalibrationError: CALIBRATION-002 where a pass needs calibration and there is none.
        """
        if program.stage < self.start:
            raise RecipeError(
                "RECIPE-003",
                f"the pipeline begins at stage {self.start}, and the program is at stage {program.stage}.",
                fix="put canonicalize before it.",
            )
        level = settings().verify if verify is None else verify
        for entry in self.passes:
            if entry.needs_calibration and calibration is None:
                raise CalibrationError(
                    "CALIBRATION-002",
                    f"pass {entry} needs calibration text, and none was given.",
                    fix="give --calibration FILES (in Python calibration=...).",
                )
        refresh(program)
        runs = level >= 2 and not program.is_meta
        inputs = seeded_inputs(program, seed=seed) if runs else []
        reference = list(program(*inputs)) if runs else []
        records: list[PassRecord] = []
        for index, entry in enumerate(self.passes):
            context = Context(calibration, seed, lambda done, total, name=entry.name: progress(name, done, total))
            progress(entry.name, 0, 1)
            begun = time.perf_counter()
            rewriter = Rewriter(program, entry.name)
            try:
                result = entry.run(program, rewriter, context)
            except SkinkError:
                raise
            except Exception as error:
                error.add_note(f"in pass {entry}, on this program:\n{print_program(program)}")
                raise
            rewriter.finish()
            if entry.yields is not None and program.stage < entry.yields:
                program.stage = entry.yields
            seconds = time.perf_counter() - begun
            if settings().dump is not None and result.edits:  # before it is verified, for whoever has to mend it
                _dump(settings().dump, index, entry, program)  # type: ignore[arg-type]
            if level >= 1:
                check_structure(program, pass_name=entry.name)
            numbers = compare(program, reference, inputs) if runs else None
            if numbers is not None and entry.exactness == "exact":
                _check_exact_change(numbers, records, program, entry.name)
            records.append(PassRecord(entry, result, seconds, level, numbers))
            progress(entry.name, 1, 1)
        return PipelineResult(tuple(records))


def _check_exact_change(numbers: Numbers, records: Sequence[PassRecord], program: Program, name: str) -> None:
    """An exact pass is judged by what it added to the difference that approximate ones made before it."""
    before = records[-1].numbers if records else None
    added = numbers.largest - (before.largest if before is not None else 0.0)
    check_exact(Numbers(numbers.relative, max(added, 0.0), numbers.divergence), program, pass_name=name)


def _dump(folder: Path, index: int, entry: Pass, program: Program) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = f"after {entry}\n\n{print_program(program, weights=True)}\n"
    (folder / f"{index:02d}_{entry.name}.txt").write_text(text, encoding="utf-8")
