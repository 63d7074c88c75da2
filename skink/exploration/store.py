"""What is finished, in an append-only file: one JSON object a line, written whole before the next point is begun.

A process that is killed leaves at most a half-written last line. It is passed over and cut off, and its point is run
again.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skink.errors import OutputError, SpaceError

POINTS_FILE = "points.jsonl"


class Store:
    """The finished points of one model, by key.

    Args:
        folder: made where it does not exist.
        model: the model's name, for the first line.
        fingerprint: of its weights.

    Raises:
        SpaceError: SPACE-005 where the folder holds results of another model.
        OutputError: OUTPUT-002 where it cannot be written.
    """

    def __init__(self, folder: Path, *, model: str, fingerprint: str) -> None:
        self.path = folder / POINTS_FILE
        self._found: dict[str, dict[str, dict[str, Any]]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines, size = _complete_lines(self.path)
            if lines:
                self._check(lines[0], model, fingerprint)
                for line in lines[1:]:
                    self._remember(line)
                with self.path.open("r+b") as file:
                    file.truncate(size)
            else:
                self.path.write_bytes(b"")
                self._append({"kind": "model", "name": model, "fingerprint": fingerprint})
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def get(self, kind: str, key: str) -> dict[str, Any] | None:
        """The record of this kind and key, the last one where there are several; None where there is none."""
        return self._found.get(kind, {}).get(key)

    def add(self, kind: str, key: str, record: Mapping[str, Any]) -> None:
        """Keep a record; it is on disk when this returns.

        Raises:
            OutputError: OUTPUT-002.
        """
        content = {"kind": kind, "key": key, **record}
        try:
            self._append(content)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        # As it would be read again.
        self._remember(json.loads(_line(content)))

    def _append(self, content: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(_line(content))
            file.flush()
            os.fsync(file.fileno())

    def _remember(self, record: dict[str, Any]) -> None:
        kind, key = record.get("kind"), record.get("key")
        if isinstance(kind, str) and isinstance(key, str):
            self._found.setdefault(kind, {})[key] = record

    def _check(self, header: Mapping[str, Any], model: str, fingerprint: str) -> None:
        there = header.get("fingerprint")
        if header.get("kind") == "model" and there == fingerprint:
            return
        raise SpaceError(
            "SPACE-005",
            f"{self.path.parent.name!r} holds results of another model, {str(header.get('name', 'unknown'))!r}.",
            why=f"the model here has fingerprint {fingerprint[:12]}, that one {str(there)[:12]}.",
            fix=f"give another folder, or remove {POINTS_FILE} in it.",
        )


def _line(content: Mapping[str, Any]) -> bytes:
    # NaN and infinity as Python writes and reads them: a lost model's perplexity may be either.
    return json.dumps(content, ensure_ascii=True).encode() + b"\n"


def _complete_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that are whole JSON objects, and how many bytes of the file are whole lines."""
    if not path.exists():
        return [], 0
    data = path.read_bytes()
    size = data.rfind(b"\n") + 1
    found = []
    for line in data[:size].splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            found.append(content)
    return found, size


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        "OUTPUT-002", f"cannot write {path}.", why=str(error), fix="choose a folder that you may write to, with space."
    )
