"""Measured rows, kept in a file as they come, and the Markdown tables that are made of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Rows:
    """Rows by what they are of. Those that stand in the file already, under equal settings, need no measuring again.

    Args:
        path: of the file, one JSON object a line; None: rows are kept in memory alone.
        settings: all that a row depends on beside what it is of.
        key: the entry of a row that says what it is of.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, str], key: str) -> None:
        self._path, self._settings, self._key = path, dict(settings), key
        self._rows: dict[str, dict[str, Any]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else ():
            row = json.loads(line)
            if row["settings"] == self._settings:
                self._rows[row[key]] = row

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self._rows[name]

    def add(self, name: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a row."""
        kept = {self._key: name, "settings": self._settings, **row}
        self._rows[name] = kept
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(kept) + "\n")
        return kept


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table under a heading, which may be empty."""
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    return "\n".join([*([f"## {title}", ""] if title else []), *lines, *(f"| {' | '.join(row)} |" for row in rows), ""])
