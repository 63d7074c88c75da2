"""Find the first rewrite that breaks a program, by halving the number of rewrites that a pipeline may make.

    runs(0) is fine, runs(n) fails   ->   the least k with runs(k) fine and runs(k + 1) failing; edit k did it

Every run begins with the same program and stops after so many edits, so about log2(n) runs do. Where failing is not a
matter of one edit alone, what is found is still an edit before which the check passes and after which it fails.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from skink.errors import BisectError, check_range
from skink.graph.dump import program_text
from skink.graph.failure import Failure
from skink.graph.pipeline import Attempt, Pipeline
from skink.graph.program import Edit, Program
from skink.graph.propagate import refresh
from skink.graph.rewriter import Rewriter
from skink.graph.verifier import Numbers, check_structure, difference, results_of, seeded_inputs
from skink.graph.windows import Windows

# Lines of the program shown around what an edit changed.
_CONTEXT = 3

# The kind of failure that an error above the bound is.
_TOO_LARGE = "error-above"


@dataclass(frozen=True)
class BisectResult:
    """The rewrite that was found.

    Args:
        edit: the first edit with which the check fails; None where the pass fails by itself, after its edits.
        pass_name: the pass that made it.
        failure: how the run with this edit fails, in one line.
        first: the index of the first edit that the pipeline makes.
        edits: how many it makes without a limit.
        runs: how many runs it took.
        otherwise: how many of them failed in another way than the one that was looked for, and counted as fine.
        error_before: relative error of the results against the given program's, before the edit; None where they could
            not be computed.
        error_after: the same after it.
        before: the program's text before the edit.
        after: the same after it.
    """

    edit: Edit | None
    pass_name: str
    failure: str
    first: int
    edits: int
    runs: int
    otherwise: int
    error_before: float | None
    error_after: float | None
    before: str
    after: str

    def diff(self, context: int = _CONTEXT) -> str:
        """What the edit changed in the program's text, with some lines around it."""
        before, after = self.before.splitlines(), self.after.splitlines()
        lines = difflib.unified_diff(before, after, "before", "after", lineterm="", n=context)
        return "\n".join(lines)


@dataclass(frozen=True)
class _Texts:
    """What passes are given to read."""

    calibration: Tensor | None
    padding: Tensor | None
    training: Windows | None
    held_out: Windows | None


@dataclass(frozen=True)
class _Trial:
    """One run with a limit."""

    failure: Failure | None
    error: float | None
    edits: tuple[Edit, ...]
    text: str


def bisect(
    program: Program,
    pipeline: Pipeline,
    *,
    calibration: Tensor | None = None,
    seed: int = 0,
    verify: int = 2,
    error_above: float | None = None,
    failure: Failure | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    padding: Tensor | None = None,
    training: Windows | None = None,
    held_out: Windows | None = None,
) -> BisectResult:
    """The first edit that makes a pipeline fail.

    Args:
        program: what the pipeline is given; left as it is.
        pipeline: its passes.
        calibration: token windows int64[N, T].
        seed: for random inputs, and for passes.
        verify: level of verification in each run.
        error_above: look for the edit that lifts the relative error of the results above this, instead of one that
            makes a pass or its verification fail.
        failure: look for a failure like this; otherwise for the one that the whole pipeline has.
        progress: called with the number of runs done, and about how many there will be.
        padding: which tokens of the windows are text (1) and which padding (0), int64[N, T]; None: all are text.
        training: text to train on. A pass that trains does so in every run that comes to it.
        held_out: text that such a pass judges by.

    Raises:
        BisectError: BISECT-001 where the check fails without any edit, or passes with all of them.
        OptionError: OPTION-002 for an `error_above` below zero.
        RecipeError: RECIPE-003, as `Pipeline.run`.
        CalibrationError: CALIBRATION-002, as `Pipeline.run`.
    """
    if error_above is not None:
        check_range("error_above", error_above, low=0.0, high=math.inf)
    texts = _Texts(calibration, padding, training, held_out)
    search = _Search(program, pipeline, texts, seed, verify, error_above)
    whole = search.run(None)
    wanted = failure if failure is not None and error_above is None else whole.failure
    if wanted is None or not _alike(wanted, whole.failure):
        raise _nothing_fails(whole, wanted, error_above)
    # All edits and one more: what happens then does not hang on an edit that is refused.
    fine, failing = 0, len(whole.edits) + 1
    total = 2 + math.ceil(math.log2(failing))
    progress(1, total)
    low, high = search.run(0), whole
    if low.failure is not None:
        raise BisectError(
            "BISECT-001",
            f"the check fails before any edit is made: {low.failure.text}",
            fix="the program that the pipeline is given is at fault, or the check: no rewrite is.",
        )
    while failing - fine > 1:
        progress(min(search.runs, total - 1), total)
        middle = (fine + failing) // 2
        trial = search.run(middle)
        if _alike(wanted, trial.failure):
            failing, high = middle, trial
        else:
            search.otherwise += trial.failure is not None
            fine, low = middle, trial
    itself = _by_itself(search, pipeline, fine, high, wanted)
    progress(total, total)
    return _result(search, fine, low, itself or high, edits=len(whole.edits), itself=itself is not None)


def _by_itself(search: "_Search", pipeline: Pipeline, fine: int, high: _Trial, wanted: Failure) -> _Trial | None:
    """Where the first edit of the failing pass is what was found, and the pass fails without it too: that run."""
    if fine >= len(high.edits) or high.edits[fine].pass_name != wanted.pass_name:
        return None
    if any(edit.pass_name == wanted.pass_name for edit in high.edits[:fine]):
        return None
    place = [entry.name for entry in pipeline.passes].index(wanted.pass_name)
    trial = search.run(fine, through=place)
    return trial if wanted.same(trial.failure) else None


def _alike(wanted: Failure, found: Failure | None) -> bool:
    """Whether a run fails as the one that is looked for; an error that is too large belongs to no pass."""
    if wanted.kind == _TOO_LARGE:
        return found is not None and found.kind == _TOO_LARGE
    return wanted.same(found)


def _result(search: "_Search", index: int, low: _Trial, high: _Trial, *, edits: int, itself: bool) -> BisectResult:
    edit = high.edits[index] if index < len(high.edits) and not itself else None
    found = high.failure
    if found is None:
        raise TypeError("what was found fails")
    return BisectResult(
        edit=edit,
        pass_name=edit.pass_name if edit is not None else found.pass_name,
        failure=found.text,
        first=search.first,
        edits=edits,
        runs=search.runs,
        otherwise=search.otherwise,
        error_before=low.error,
        error_after=high.error,
        before=low.text,
        after=high.text,
    )


def _nothing_fails(whole: _Trial, wanted: Failure | None, error_above: float | None) -> BisectError:
    if error_above is not None:
        what = f"with all {len(whole.edits)} edits the error is {whole.error or 0.0:.2e}, not above {error_above:g}."
        fix = "give a lower --error-above."
    elif whole.failure is None:
        what = f"the pipeline runs to its end, with {len(whole.edits)} edits, and every check passes."
        fix = "give --error-above X for the edit that lifts the error above X."
        if wanted is not None:
            fix += " The versions may differ from those of the failure: skink repro shows both."
    else:
        what = f"the pipeline fails in another way: {whole.failure.text}"
        fix = "mend that first; or compare the versions, which skink repro shows."
    return BisectError("BISECT-001", what, why=f"looked for: {wanted.text}" if wanted is not None else "", fix=fix)


class _Search:
    """Runs of one pipeline on one program."""

    def __init__(
        self,
        program: Program,
        pipeline: Pipeline,
        texts: _Texts,
        seed: int,
        verify: int,
        error_above: float | None,
    ) -> None:
        refresh(program)
        self._program, self._pipeline, self._seed = program, pipeline, seed
        self._texts = texts
        # The error is computed here, once for each run: not after each edit, and where it is what is looked for not
        # after each pass either.
        self._verify = min(verify, 2 if error_above is None else 1)
        self._error_above = error_above
        self.first = len(program.edits)
        self._inputs = [] if program.is_meta else seeded_inputs(program, seed=seed)
        self._reference = [] if program.is_meta else results_of(program, self._inputs)
        self.runs = 0
        self.otherwise = 0

    def run(self, limit: int | None, *, through: int = -1) -> _Trial:
        """The pipeline with so many edits at most; all passes up to the one at place `through` run all the same."""
        self.runs += 1
        copy = self._program.clone()
        done = self._pipeline.attempt(
            copy,
            **vars(self._texts),
            seed=self._seed,
            verify=self._verify,
            limit=None if limit is None else self.first + limit,
            through=through,
        )
        failure = done.failure
        if limit == 0 and through < 0:
            failure = self._given(copy)
        error = self._error(copy, done)
        if failure is None and self._error_above is not None and not (error or 0.0) <= self._error_above:
            last = copy.edits[-1].pass_name if copy.edits else ""
            failure = Failure(_TOO_LARGE, "", last, f"the relative error is {error:.2e}, above {self._error_above:g}")
        return _Trial(failure, error, tuple(copy.edits[self.first :]), program_text(copy))

    def _given(self, program: Program) -> Failure | None:
        """What is wrong with the program that the pipeline is given."""
        try:
            check_structure(program, pass_name="(none)")
        except Exception as error:
            return Failure.of(error, "")
        return None

    def _error(self, program: Program, done: Attempt) -> float | None:
        """The relative error of the results, where there are any."""
        if program.is_meta:
            return None
        numbers: Numbers
        try:
            if done.error is not None:
                # The pass was stopped before it tidied up.
                Rewriter(program, done.failure.pass_name if done.failure else "").finish()
            numbers = difference(results_of(program, self._inputs), self._reference)
        except Exception:  # a graph that is broken has no results; how it is broken is in the failure
            return None
        return numbers.relative
