"""Checkpoints of a run: written so that a process that is killed at any moment leaves a whole one behind.

A checkpoint is a folder `step-00000120`:

    process-0.safetensors   what process 0 holds: weights, optimizer state, best weights, random state
    process-1.safetensors   of the others their random state, and their shards where weights are sharded
    checkpoint.json         everything else, and size and CRC-32 of each file

It is written under a temporary name, flushed to the disk, and renamed when it is whole. Nothing in it is executed when
it is read: tensors are safetensors, the rest is JSON.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from skink.errors import OutputError, RecoveryError

_FORMAT = 1
_FACTS = "checkpoint.json"
_PARTIAL = ".partial"
# How many are kept: should the newest turn out to be damaged, the run goes on from the one before.
_KEPT = 2


class UnusableError(Exception):
    """Why a checkpoint cannot be read."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that is whole.

    Args:
        folder: where it lies.
        step: steps that were made before it.
        state: what `write` was given, plain data.
        passed_over: newer ones that cannot be read, each with the reason.
    """

    folder: Path
    step: int
    state: dict[str, Any]
    passed_over: tuple[str, ...] = field(default=())


def write(
    folder: Path,
    *,
    step: int,
    identity: str,
    state: dict[str, Any],
    tensors: dict[str, Tensor],
    process: int = 0,
    wait: Callable[[], None] = lambda: None,
) -> None:
    """Write a checkpoint and remove all but the newest two; all processes call it together.

    Args:
        folder: of the run; made where it is not there.
        step: steps made.
        identity: of the run.
        state: plain data that JSON can hold; the one of process 0 counts.
        tensors: what this process holds.
        process: which one this is.
        wait: goes on when all processes have called it.

    Raises:
        OutputError: OUTPUT-002 no space, no right to write.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / (final.name + _PARTIAL)
    try:
        if process == 0:
            for left in folder.glob("*" + _PARTIAL):
                shutil.rmtree(left)
            partial.mkdir(parents=True)
        wait()
        file = partial / f"process-{process}.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
        _flush(file)
        wait()
        if process == 0:
            files = {path.name: _sum(path) for path in sorted(partial.glob("process-*.safetensors"))}
            facts = {"format": _FORMAT, "identity": identity, "step": step, "files": files, "state": state}
            (partial / _FACTS).write_text(json.dumps(facts))
            _flush(partial / _FACTS)
            _flush(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            _flush(folder)
            for old in _checkpoints(folder)[_KEPT:]:
                shutil.rmtree(old)
        wait()
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            "OUTPUT-002",
            f"cannot write a checkpoint to {folder}: {reason[:1].lower()}{reason[1:]}.",
            fix="free some space, or choose a folder on another disk; the run goes on from the last whole checkpoint.",
        ) from error


def newest(folder: Path, identity: str, usable: Callable[[dict[str, Any]], str] = lambda state: "") -> Found | None:
    """The newest checkpoint that is whole, or None where none was ever finished.

    Args:
        folder: of the run.
        identity: of the run that asks.
        usable: given a checkpoint's state, why this run cannot use it; empty where it can.

    Raises:
        RecoveryError: RECOVER-004 where there are checkpoints and none can be used.
    """
    reasons: list[str] = []
    for path in _checkpoints(folder):
        try:
            facts = _facts(path, identity)
            if reason := usable(facts["state"]):
                raise UnusableError(reason)
        except UnusableError as error:
            reasons.append(f"{path.name}: {error}")
        else:
            return Found(path, facts["step"], facts["state"], tuple(reasons))
    if reasons:
        raise RecoveryError(
            "RECOVER-004",
            f"no checkpoint in {folder} can be used.",
            why="\n".join(reasons),
            fix="remove the folder to begin again, or restore a checkpoint that is whole.",
        )
    return None


def at(folder: Path, step: int) -> Found:
    """A checkpoint that another process has found to be whole."""
    path = folder / f"step-{step:08d}"
    return Found(path, step, json.loads((path / _FACTS).read_text())["state"])


def read_tensors(folder: Path, process: int) -> dict[str, Tensor]:
    """What a process held; nothing where it wrote no file."""
    file = folder / f"process-{process}.safetensors"
    return load_file(file) if file.exists() else {}


def _checkpoints(folder: Path) -> list[Path]:
    """Finished ones, the newest first."""
    names = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(names, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _facts(path: Path, identity: str) -> dict[str, Any]:
    """What checkpoint.json says, when all of it holds."""
    try:
        facts = json.loads((path / _FACTS).read_text())
        if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
            raise UnusableError(f"{_FACTS} is not of format {_FORMAT}")
        if facts["identity"] != identity:
            raise UnusableError("it belongs to a run with other options, text or weights")
        for name, expected in facts["files"].items():
            if _sum(path / name) != expected:
                raise UnusableError(f"{name} is damaged: its size or checksum is not what was written")
    except OSError as error:
        raise UnusableError(f"{error.filename or path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusableError(f"{_FACTS} is damaged: {error}") from error
    return facts


def _sum(path: Path) -> dict[str, int]:
    crc, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"bytes": size, "crc32": crc}


def _flush(path: Path) -> None:
    """To the disk, so that a rename cannot overtake the data; folders too, where the system lets them be opened."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
