"""`Run`: one run of a pipeline, pass by pass, each verified, timed, and dumped where it changed something."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from skink.errors import OutputError
from skink.graph.analyses import Basis, weights_state
from skink.graph.dump import dump_edits, dump_program
from skink.graph.passes import Context, Pass, PassResult
from skink.graph.program import Edit, Program, Stage
from skink.graph.rewriter import Rewriter, describe
from skink.graph.snapshot import Snapshot
from skink.graph.verifier import (
    Numbers,
    check_exact,
    check_structure,
    difference,
    results_of,
    run_results,
    seeded_inputs,
)

Progress = Callable[[str, int, int], None]


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


class Run:
    """One run of a pipeline: what its passes share, and what they are compared with."""

    def __init__(
        self, program: Program, context: Context, level: int, limit: int | None, dump: Path | None, progress: Progress
    ) -> None:
        self._program, self._context, self._limit, self._dump, self._progress = program, context, limit, dump, progress
        self._level = level
        # Passes of pipelines that ran before, so that their dumps stand before those of this one.
        self._passes_before = len({edit.pass_name for edit in program.edits})
        self._with_numbers = level >= 2 and not program.is_meta
        self._inputs = seeded_inputs(program, seed=context.seed) if self._with_numbers else []
        self._reference = results_of(program, self._inputs) if self._with_numbers else []
        self._results, self._error = self._reference, 0.0
        self.start: Snapshot | None = None
        self.before: Snapshot | None = None
        self._remembered: tuple[object, ...] = ()

    def keep_original(self) -> None:
        """Keep a copy of the program, once it is canonical, for passes to learn from where nobody named another."""
        if self._context.original is None and self._program.stage >= Stage.CANONICAL:
            self._context = replace(self._context, original=self._program.clone())

    def remember(self) -> None:
        """Keep the program as it is, for a reproducer."""
        now = (len(self._program.edits), self._program.stage, len(self._program.graph.nodes))
        if self._remembered != now:
            self._remembered = now
            self.before = Snapshot(self._program)
            self.start = self.start or self.before

    def one(self, index: int, entry: Pass) -> PassRecord:
        """Run a pass, and verify what it left."""
        program = self._program
        context = replace(self._context, progress=lambda done, total: self._progress(entry.name, done, total))
        first, weights = len(program.edits), weights_state(program)
        rewriter = Rewriter(
            program, entry.name, limit=self._limit, on_edit=self._measure if self._measures_edits else None
        )
        self._progress(entry.name, 0, 1)
        begun = time.perf_counter()
        result = entry.run(program, rewriter, context)
        rewriter.finish()
        # A pass that the limit cut short has not made of the program what its stage promises.
        if entry.yields is not None and program.stage < entry.yields and not rewriter.exhausted:
            program.stage = entry.yields
        seconds = time.perf_counter() - begun
        edits = program.edits[first:]
        changed: list[Basis] = ["graph"] if edits or result.edits else []
        if weights_state(program) != weights:
            changed.append("weights")
        context.analyses.drop(program, changed, preserves=entry.preserves)
        if self._dump is not None and changed:  # before it is verified, for whoever has to mend it
            _write_dump(self._dump, self._passes_before + index, entry, program, edits)
        if self._level >= 1:
            check_structure(program, pass_name=entry.name, edits=edits)
        numbers = self._numbers(entry, edits) if self._with_numbers else None
        self._progress(entry.name, 1, 1)
        return PassRecord(entry, result, seconds, self._level, numbers)

    @property
    def _measures_edits(self) -> bool:
        return self._level >= 3 and self._with_numbers

    def _numbers(self, entry: Pass, edits: Sequence[Edit]) -> Numbers:
        """How the results differ from the captured model's; an exact pass is judged by what it changed itself."""
        before, error = self._results, self._error
        self._results = run_results(self._program, self._inputs, pass_name=entry.name, edits=edits)
        numbers = difference(self._results, self._reference)
        self._error = numbers.relative
        if entry.exactness == "exact":
            own = difference(self._results, before)
            check_exact(own, self._program, pass_name=entry.name, edits=edits, before=error)
        return numbers

    def _measure(self, edit: Edit) -> None:
        """Level 3: the error after one edit, kept with it."""
        # A copy without the nodes that the edit left dead: they may read what is no longer there.
        copy = self._program.clone()
        Rewriter(copy, edit.pass_name).finish()
        found = run_results(copy, self._inputs, pass_name=edit.pass_name, edits=[edit])
        self._program.edits[edit.index] = replace(edit, error=difference(found, self._reference).relative)


def _write_dump(folder: Path, index: int, entry: Pass, program: Program, edits: Sequence[Edit]) -> None:
    try:
        dump_program(folder, index, entry, program)
        dump_edits(folder, edits)
    except OSError as error:
        raise OutputError(
            "OUTPUT-002",
            f"cannot write to the folder that SKINK_DUMP names: {error.strerror}",
            where=str(error.filename or folder),
            fix="name a folder that you may write to.",
        ) from error
