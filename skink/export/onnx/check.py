"""The check of an exported folder: ONNX Runtime against what PyTorch computed, in a process of its own.

    python -m skink.export.onnx.check FOLDER --cases FILE --tolerance 1e-4

A fresh process sees what a user's will: nothing of ours is registered, and a graph that needs it does not load. It
prints one JSON object and exits with 0 where all is well.

Two things are compared. **Logits**, at every real token: `max |onnx - torch| <= tolerance * max |torch|`. **Greedy
tokens**: ONNX Runtime is fed PyTorch's own tokens, and at each step its choice must be the next one. A different choice
counts as a tie, and passes, only where PyTorch's logits of the two tokens lie closer together than the two errors that
the first comparison allows, 2 * tolerance * max |torch|: then rounding alone decides. Ties are counted and reported.
Every step is judged on PyTorch's tokens, so one tie does not hide what comes after it; and where there is no tie,
generation that feeds itself gives equal tokens.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from skink.errors import ExportError
from skink.export.onnx.session import OrtGraph

_SECONDS = 3600  # a check that hangs for longer is given up


@dataclass(frozen=True)
class CaseResult:
    """One comparison.

    Args:
        name: which case.
        error: largest difference of any output; infinite where one side is not finite.
        scale: largest magnitude that PyTorch gave.
        where: the place of the largest difference.
        tokens: greedy tokens compared.
        ties: tokens that differed within rounding.
        wrong: tokens that differed otherwise, in words.
    """

    name: str
    error: float
    scale: float
    where: str
    tokens: int
    ties: int
    wrong: tuple[str, ...]

    @property
    def relative(self) -> float:
        """The error in units of the scale."""
        return self.error / self.scale if self.scale else self.error


@dataclass(frozen=True)
class CheckResult:
    """All comparisons of one export."""

    tolerance: float
    cases: tuple[CaseResult, ...]
    onnxruntime: str

    @property
    def ok(self) -> bool:
        """Whether every case is within tolerance and every token right."""
        return not self.failures()

    @property
    def relative(self) -> float:
        """The largest relative error."""
        return max((case.relative for case in self.cases), default=0.0)

    @property
    def tokens(self) -> int:
        """Greedy tokens compared."""
        return sum(case.tokens for case in self.cases)

    @property
    def ties(self) -> int:
        """Tokens that differed within rounding."""
        return sum(case.ties for case in self.cases)

    def failures(self) -> list[str]:
        """What differed, by how much and where: one line each."""
        lines = []
        for case in self.cases:
            if not case.relative <= self.tolerance:
                lines.append(
                    f"{case.name}: off by {case.error:.3g} where the largest value is {case.scale:.3g} "
                    f"({case.relative:.2g} of it, {self.tolerance:g} allowed), at {case.where}"
                )
            lines += [f"{case.name}: {wrong}" for wrong in case.wrong]
        return lines

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"ok": self.ok, "relative": self.relative, "ties": self.ties}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "CheckResult":
        """From `as_json`."""
        cases = tuple(CaseResult(**{**case, "wrong": tuple(case["wrong"])}) for case in values["cases"])
        return cls(values["tolerance"], cases, values["onnxruntime"])


def compare(folder: str | Path, cases: str | Path, tolerance: float) -> CheckResult:
    """Run every case of the file on the exported graph, in this process.

    Raises:
        ExportError: EXPORT-003 where ONNX Runtime cannot load or run the graph.
    """
    import onnxruntime

    graph = OrtGraph(folder)
    results = []
    with safe_open(str(cases), framework="np") as file:
        for index, case in enumerate(json.loads(file.metadata()["cases"])):
            inputs = {name: file.get_tensor(f"{index}.input.{name}") for name in case["inputs"]}
            expected = {name: file.get_tensor(f"{index}.output.{name}") for name in case["outputs"]}
            real = file.get_tensor(f"{index}.real")
            try:
                found = _run_in_chunks(graph, inputs, case["chunks"])
            except Exception as error:  # ONNX Runtime raises classes of its own, which share no base but this
                raise ExportError(
                    "EXPORT-003",
                    f"ONNX Runtime {onnxruntime.__version__} cannot run the exported graph: {case['name']}.",
                    why=str(error),
                    fix="report this with the model's configuration.",
                ) from error
            results.append(_judge(case, found, expected, real, inputs, tolerance))
    return CheckResult(tolerance, tuple(results), onnxruntime.__version__)


def _run_in_chunks(graph: OrtGraph, inputs: dict[str, np.ndarray], chunks: Sequence[int]) -> dict[str, np.ndarray]:
    """Outputs of the whole sequence, read in chunks of these lengths (all at once where there are none)."""
    state = graph.empty_state(next(iter(inputs.values())).shape[0])
    pieces: list[dict[str, np.ndarray]] = []
    start = 0
    for length in chunks or [0]:
        feeds = {}
        for name, array in inputs.items():
            dims = graph.inputs[name].shape if name in graph.inputs else []
            if chunks and "sequence" in dims:
                feeds[name] = np.take(array, range(start, start + length), axis=dims.index("sequence"))
            elif chunks and "total" in dims:
                feeds[name] = np.take(array, range(start + length), axis=dims.index("total"))
            else:
                feeds[name] = array
        piece, state = graph.run(feeds, state)
        pieces.append(piece)
        start += length
    if len(pieces) == 1:
        return pieces[0]
    return {
        name: np.concatenate([piece[name] for piece in pieces], axis=_token_axis(entry.shape))
        for name, entry in graph.outputs.items()
    }


def _token_axis(dims: Sequence[int | str]) -> int:
    return next(axis for axis, dim in enumerate(dims) if dim in ("sequence", "kept"))


def _judge(
    case: dict[str, Any],
    found: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    real: np.ndarray,
    inputs: dict[str, np.ndarray],
    tolerance: float,
) -> CaseResult:
    error, scale, where = 0.0, 0.0, ""
    for name, wanted in expected.items():
        wanted = wanted.astype(np.float64)
        difference = np.abs(found[name].astype(np.float64) - wanted)
        if wanted.shape[: real.ndim] == real.shape:
            # What a model computes for padding is nobody's concern.
            padding = ~real.reshape(*real.shape, *[1] * (wanted.ndim - real.ndim))
            difference, wanted = np.where(padding, 0.0, difference), np.where(padding, 0.0, wanted)
        difference = np.where(np.isfinite(difference), difference, np.inf)
        largest = float(difference.max(initial=0.0))
        scale = max(scale, float(np.abs(wanted).max(initial=0.0)))
        if largest > error:
            error = largest
            place = np.unravel_index(int(difference.argmax()), difference.shape)
            axes = ("row", "token", "index", "index", "index")
            where = f"{name}, " + ", ".join(f"{axis} {int(i)}" for axis, i in zip(axes, place))
    tokens, ties, wrong = 0, 0, []
    if case["greedy_from"] is not None:
        logits, ids = expected["logits"].astype(np.float64), inputs["input_ids"]
        for position in range(case["greedy_from"], ids.shape[1]):
            chosen = found["logits"][:, position - 1].argmax(-1)
            for row, (token, right) in enumerate(zip(chosen.tolist(), ids[:, position].tolist())):
                tokens += 1
                if token == right:
                    continue
                margin = float(logits[row, position - 1, right] - logits[row, position - 1, token])
                if margin <= 2 * tolerance * scale:
                    ties += 1
                else:
                    wrong.append(f"row {row}, token {position}: {token} instead of {right}, {margin:.3g} less likely")
    return CaseResult(case["name"], error, scale, where, tokens, ties, tuple(wrong))


def check_in_fresh_process(folder: str | Path, cases: str | Path, tolerance: float) -> CheckResult:
    """`compare`, in a new Python process.

    Raises:
        ExportError: EXPORT-003 where ONNX Runtime cannot load or run the graph there.
    """
    root = Path(__file__).resolve().parents[3]
    # As `python -m skink.export.onnx.check`, of the very package that runs here, installed or not.
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(root)!r}); "
        "runpy.run_module('skink.export.onnx.check', run_name='__main__')"
    )
    arguments = [str(folder), "--cases", str(cases), "--tolerance", repr(tolerance)]
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _broken(f"gave no answer in {_SECONDS} s.", "") from error
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise _broken(f"ended with status {done.returncode}.", done.stderr[-2000:]) from error
    if "code" in answer:
        raise ExportError(answer["code"], answer["what"], where=answer["where"], why=answer["why"], fix=answer["fix"])
    return CheckResult.from_json(answer)


def _broken(what: str, why: str) -> ExportError:
    return ExportError(
        "EXPORT-003",
        f"the process that checks the exported graph {what}",
        why=why,
        fix="try again with more memory, or export with check=False.",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Check one folder; prints JSON. Returns 0 where all is well, otherwise 1."""
    parser = argparse.ArgumentParser(prog="python -m skink.export.onnx.check", description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--cases", required=True, help="inputs and what PyTorch computed, as written by the export")
    parser.add_argument("--tolerance", type=float, required=True, help="largest error, relative to the largest output")
    options = parser.parse_args(arguments)
    try:
        result = compare(options.folder, options.cases, options.tolerance)
    except ExportError as error:
        sys.stdout.write(json.dumps(error.as_json()) + "\n")
        return 1
    sys.stdout.write(json.dumps(result.as_json()) + "\n")
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
