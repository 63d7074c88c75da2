"""Leave a reproducer behind: the folder that `skink.graph.reproducer` describes and reads."""

import json
import shutil
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from skink.graph.dump import dump_edits, program_text
from skink.graph.failure import Failure
from skink.graph.reproducer import FILE, FORMAT, TEXTS, Circumstances
from skink.graph.serialization import program_to_json
from skink.graph.snapshot import Snapshot
from skink.graph.versions import versions
from skink.graph.windows import Windows

# Of both programs together. What fits into an attachment is worth keeping; a large model's owner has its weights.
WEIGHTS_LIMIT = 2**30


def write_reproducer(
    parent: Path | None, error: Exception, failure: Failure, at: Circumstances, start: Snapshot, before: Snapshot
) -> Path:
    """Write a folder, and say where.

    Args:
        parent: the folder to make it in; None: the system's folder for temporary files.
        error: with its traceback.
        failure: the same, to be compared.
        at: what the pipeline ran with.
        start: the program as the pipeline got it.
        before: the program just before the failing pass; may be the same object.

    Raises:
        OSError: where it cannot be written.
        GraphError: GRAPH-001 where the program holds what cannot be written to a file.
    """
    programs = {"start": start.program()}
    if before is not start:
        programs["before"] = before.program()
    # Before a folder is made, since they may fail.
    graphs = {name: json.dumps(program_to_json(program)) for name, program in programs.items()}
    new = {name: tensor for name, tensor in before.weights.items() if start.weights.get(name) is not tensor}
    stored = {"start": start.weights, "before": new}
    complete = not any(tensor.is_meta for tensors in stored.values() for tensor in tensors.values())
    kept = complete and sum(t.numel() * t.element_size() for ts in stored.values() for t in ts.values()) < WEIGHTS_LIMIT
    folder = _new_folder(parent, at.index, failure.pass_name)
    try:
        for name, text in graphs.items():
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
            if kept:
                _write_tensors(folder / f"{name}.safetensors", stored[name])
        _write_rest(folder, error, failure, at, start, before, kept=kept)
    except BaseException:
        # Nothing half-written is left behind.
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _write_rest(
    folder: Path,
    error: Exception,
    failure: Failure,
    at: Circumstances,
    start: Snapshot,
    before: Snapshot,
    *,
    kept: bool,
) -> None:
    """Everything but the programs and their weights."""
    if at.calibration is not None:
        _write_windows(folder / "calibration.safetensors", Windows(at.calibration, padding=at.padding))
    # Text of any length may be trained on.
    texts = {name: text for name in TEXTS if (text := getattr(at, name)) is not None and _size(text) < WEIGHTS_LIMIT}
    for name, text in texts.items():
        _write_windows(folder / f"{name}.safetensors", text)
    content = {
        "format": FORMAT,
        "failure": vars(failure),
        "start": str(at.start),
        "index": at.index,
        "seed": at.seed,
        "verify": at.verify,
        "limit": at.limit,
        "weights": kept,
        "calibration": at.calibration is not None,
        **{name: {"source": text.source, "sha256": text.sha256} for name, text in texts.items()},
        "edits_at_start": len(start.edits),
    }
    _write_json(folder / FILE, content)
    _write_json(folder / "versions.json", versions(at.packages))
    dump_edits(folder, before.edits)
    trace = "".join(traceback.format_exception(error))
    missing = "" if kept else _WITHOUT_WEIGHTS
    files = {
        "pipeline.txt": at.pipeline,
        "error.txt": f"{failure.text}\n\n{trace}",
        "program.txt": program_text(before.program(), weights=True),
        "README.txt": _README.format(failure=failure.text, pass_name=failure.pass_name, missing=missing),
    }
    for name, content_of in files.items():
        (folder / name).write_text(content_of.rstrip("\n") + "\n", encoding="utf-8", errors="backslashreplace")


def _size(text: Windows) -> int:
    """Bytes that windows take in a file."""
    return text.tokens.numel() * text.tokens.element_size() * (1 if text.padding is None else 2)


def _write_windows(path: Path, text: Windows) -> None:
    _write_tensors(path, {"tokens": text.tokens, **({} if text.padding is None else {"padding": text.padding})})


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Copies: files hold no tensor twice, and tensors may be views of one.
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


_README = """A pass of Skink failed here, and this folder holds what it takes to see it again:

    {failure}

From inside this folder, on any machine with the versions of versions.json:

    skink repro .              run the pipeline again, from the start
    skink repro . --local      run it from just before the pass {pass_name}
    skink bisect .             find the first rewrite that does it, and show it

{missing}The model's graph, its weights and the tokens of all given text are in here: look through it before you
send it to anybody.
"""
_WITHOUT_WEIGHTS = """The weights are not in here: they are too large, or there were none. Structure and shapes can be
checked again, numbers cannot, unless you have the model: skink repro . --weights-of MODEL

"""


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _new_folder(parent: Path | None, index: int, pass_name: str) -> Path:
    name = f"reproducer_{index:02d}_{pass_name}"
    if parent is None:
        return Path(tempfile.mkdtemp(prefix=f"skink_{name}_"))
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        folder = parent / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent} is full of reproducers")
