"""What `SKINK_DUMP` asks for: the program's text after each pass that changed it, and every edit."""

import json
from collections.abc import Sequence
from pathlib import Path

from skink.graph.passes import Pass
from skink.graph.program import Edit, Program
from skink.graph.text import print_program

EDITS_FILE = "edits.jsonl"


def dump_program(folder: Path, index: int, entry: Pass, program: Program) -> None:
    """Write `01_low-rank.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f"after {entry}\n\n{print_program(program, weights=True)}\n"
    (folder / f"{index:02d}_{entry.name}.txt").write_text(text, encoding="utf-8")


def dump_edits(folder: Path, edits: Sequence[Edit]) -> None:
    """Add a line of JSON for each edit; a program's first edit begins the file anew."""
    if not edits:
        return
    folder.mkdir(parents=True, exist_ok=True)
    mode = "w" if edits[0].index == 0 else "a"
    with (folder / EDITS_FILE).open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(vars(edit)) + "\n" for edit in edits)


def program_text(program: Program, *, weights: bool = False) -> str:
    """The printed program, or why a broken one cannot be printed."""
    try:
        return print_program(program, weights=weights)
    except Exception as error:
        return f"(it cannot be printed: {type(error).__name__}: {error})"
