"""Reproducers: a folder with all that a failure of a pipeline needs to happen again on another machine.

    reproducer.json      what failed and how; seed, levels, stage; format
    pipeline.txt         the passes on one line
    start.json           the program as the pipeline got it          start.safetensors    its weights
    before.json          the program just before the failing pass    before.safetensors   those that differ by then
    calibration.safetensors   token windows, and which tokens are padding, where there are any
    training.safetensors, held_out.safetensors   likewise, for passes that train; not where they are too large
    edits.jsonl          the edits made before the failing pass, a line of JSON each
    program.txt          the program just before the failing pass, to be read
    error.txt            the error with its traceback
    versions.json        versions of everything
    README.txt           what to do with it

All of it is data: operators are looked up in the allow-list of operators.py, passes by their names, and nothing in a
folder is executed. Large weights are left out; then only shapes can be checked again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from skink.errors import ReproducerError, SkinkError
from skink.graph.dump import EDITS_FILE
from skink.graph.failure import Failure
from skink.graph.program import Edit, Program, Stage
from skink.graph.propagate import refresh
from skink.graph.serialization import load_graph
from skink.graph.verifier import first_line
from skink.graph.windows import Windows

FORMAT = 1
FILE = "reproducer.json"

# What passes that train read.
TEXTS = ("training", "held_out")

_EDITTEXTS = ("pass_name", "rule", "node", "qualified_name", "detail", "source")


@dataclass(frozen=True)
class Circumstances:
    """What a pipeline ran with.

    Args:
        pipeline: the passes, on one line.
        packages: names of the packages that they come from.
        start: the stage that the pipeline begins at.
        index: the failing pass's place.
        seed: for verification and passes.
        verify: level of verification.
        limit: the most edits, or None.
        calibration: token windows, or None.
        padding: which of their tokens are text (1) and which padding (0), or None.
        training: text to train on, or None.
        held_out: text that a pass that trains judges by, or None.
    """

    pipeline: str
    packages: tuple[str, ...]
    start: Stage
    index: int
    seed: int
    verify: int
    limit: int | None
    calibration: Tensor | None
    padding: Tensor | None = None
    training: Windows | None = None
    held_out: Windows | None = None


@dataclass(frozen=True)
class Reproducer:
    """What a folder holds.

    Args:
        failure: how it failed.
        circumstances: what it ran with.
        start: the program as the pipeline got it.
        before: the program just before the failing pass.
        versions: of packages, where it failed.
        weights: whether the programs have their weights.
    """

    failure: Failure
    circumstances: Circumstances
    start: Program
    before: Program
    versions: Mapping[str, str]
    weights: bool


def read_reproducer(folder: Path, weights: Mapping[str, Tensor] | None = None) -> Reproducer:
    """What a folder holds; it may come from anybody, so everything in it is checked.

    Args:
        folder: where it is.
        weights: by qualified name, for a folder that was written without them.

    Raises:
        ReproducerError: REPRO-001 where anything is missing, damaged, or of another format.
    """
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{FILE} is no object")
        if content["format"] != FORMAT:
            raise ValueError(f"it is of format {content['format']!r}, and this Skink reads format {FORMAT}")
        failure = Failure(**{key: _text(content["failure"][key]) for key in ("kind", "code", "pass_name", "text")})
        with_weights = content["weights"] is True
        start_weights = _tensors(folder / "start.safetensors") if with_weights else dict(weights or {})
        start = _program(folder / "start.json", start_weights, complete=with_weights)
        if (folder / "before.json").exists():
            changed = _tensors(folder / "before.safetensors") if with_weights else {}
            before = _program(folder / "before.json", {**start_weights, **changed}, complete=with_weights)
        else:
            before = start.clone()
        edits = _edits(folder / EDITS_FILE)
        start.edits[:], before.edits[:] = edits[: _number(content["edits_at_start"])], edits
        text = _tensors(folder / "calibration.safetensors") if content["calibration"] is True else None
        known = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
        circumstances = Circumstances(
            pipeline=(folder / "pipeline.txt").read_text(encoding="utf-8").strip(),
            packages=tuple(str(name) for name in known),
            start=Stage[_text(content["start"]).upper()],
            index=_number(content["index"]),
            seed=_number(content["seed"]),
            verify=_number(content["verify"]),
            limit=None if content["limit"] is None else _number(content["limit"]),
            calibration=None if text is None else text["tokens"],
            padding=None if text is None else text.get("padding"),
            **{name: _read_windows(folder, name, content) for name in TEXTS},
        )
        versions_there = {str(name): _text(value) for name, value in known.items()}
        return Reproducer(failure, circumstances, start, before, versions_there, not start.is_meta)
    except (
        OSError, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
        SafetensorError, SkinkError,
    ) as error:  # fmt: skip
        reason = error.what if isinstance(error, SkinkError) else first_line(error)
        raise ReproducerError(
            "REPRO-001",
            f"{str(folder)!r} is no reproducer that can be read.",
            why=reason,
            fix=f"give the folder that a failure left, with {FILE} in it, copied whole.",
        ) from error


def _program(path: Path, weights: Mapping[str, Tensor], *, complete: bool) -> Program:
    program = load_graph(path.read_text(encoding="utf-8"), weights)
    missing = next((name for name, tensor in program.weights() if tensor.is_meta), None)
    if complete and missing is not None:
        raise ValueError(f"{path.name} reads the weight {missing!r}, which is not in the folder")
    refresh(program)
    return program


def _read_windows(folder: Path, name: str, content: Mapping[str, Any]) -> Windows | None:
    """Windows where reproducer.json names them; it may be older than they are."""
    about = content.get(name)
    if about is None:
        return None
    tensors = _tensors(folder / f"{name}.safetensors")
    return Windows(tensors["tokens"], _text(about["source"]), _text(about["sha256"]), tensors.get("padding"))


def _tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        raise TypeError(f"{value!r} is no whole number of 64 bits")
    return value


def _edits(path: Path) -> list[Edit]:
    """The log of edits; a file without them is left out."""
    found: list[Edit] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        entry = json.loads(line)
        error = entry["error"]
        texts = {key: _text(entry[key]) for key in _EDITTEXTS}
        found.append(Edit(index=len(found), **texts, error=None if error is None else float(error)))
    return found
