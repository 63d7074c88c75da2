"""What a command says and where: results to stdout; progress, warnings and errors to stderr; `--json` as one object."""

import io
import json
import logging
import math
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from skink.errors import SkinkError
from skink.settings import settings

# Exit statuses: 0 done, 1 an error that the user can mend, 2 a command line that cannot be read (typer's own), and:
DEFECT = 70
INTERRUPTED = 130
TERMINATED = 143


@dataclass(frozen=True)
class Session:
    """One run of a command.

    Args:
        as_json: results and errors are one JSON object on stdout.
        stdout: where results go.
        out: a rich console on `stdout`.
        err: a rich console on stderr.
    """

    as_json: bool
    stdout: TextIO
    out: Console
    err: Console

    @classmethod
    def start(cls, *, as_json: bool) -> "Session":
        """A session on this process's streams; of several processes that work together, the first alone is heard."""
        if not settings().main_process:
            nowhere = io.StringIO()
            return cls(as_json, nowhere, Console(file=nowhere), Console(file=nowhere, stderr=True))
        out = Console(file=sys.stdout, highlight=False, emoji=False, soft_wrap=False)
        err = Console(file=sys.stderr, highlight=False, emoji=False, stderr=True)
        return cls(as_json, sys.stdout, out, err)

    def emit(self, result: Mapping[str, Any]) -> None:
        """The result as JSON, once per run."""
        self.stdout.write(json.dumps(finite(result), indent=2) + "\n")
        self.stdout.flush()

    def show(self, *parts: RenderableType) -> None:
        """Results for people. Text is printed as it is, long lines unbroken."""
        for part in parts:
            text = Text(part) if isinstance(part, str) else part
            self.out.print(text, soft_wrap=isinstance(text, Text))

    def write(self, text: str) -> None:
        """A piece of a result as it comes, without a line's end."""
        self.stdout.write(text)
        self.stdout.flush()

    def note(self, text: str) -> None:
        """A line on stderr."""
        self.err.print(Text(text, style="dim"), soft_wrap=True)

    def fail(self, error: SkinkError) -> None:
        """An error for the user: its lines on stderr, and with `--json` its parts on stdout."""
        first, *rest = str(error).splitlines()
        text = Text(first, style="bold red")
        for line in rest:
            text.append("\n")
            # What to do next is the line to look for.
            text.append(line, style="not bold bright_white" if line.startswith("  fix:") else "not bold default")
        self.err.print(text, soft_wrap=True)
        if self.as_json:
            self.emit({"error": error.as_json()})

    def fail_usage(self, message: str) -> None:
        """The JSON form of a usage error, whose text typer prints."""
        if self.as_json:
            error = SkinkError("USAGE-001", message, fix="see the command's --help.")
            self.emit({"error": error.as_json()})

    def interrupted(self) -> None:
        """Ctrl-C."""
        error = SkinkError("INTERRUPT-001", "interrupted.", why="Nothing half-written was left behind.")
        self.err.print(Text("Interrupted: nothing half-written was left behind."), soft_wrap=True)
        if self.as_json:
            self.emit({"error": error.as_json()})

    def defect(self, error: Exception) -> None:
        """An exception that no command should let out."""
        traceback.print_exception(error, file=sys.stderr)
        report = SkinkError(
            "DEFECT-001",
            f"{type(error).__name__} where none was expected: this is a defect in Skink, not in what you did.",
            why=str(error).strip().split("\n", 1)[0],
            fix="report it with the traceback above, the command, and `skink --version`.",
        )
        self.fail(report)


def session_of(context: typer.Context) -> Session:
    """The session that the group started for this command."""
    found = context.find_root().obj
    if not isinstance(found, Session):
        raise TypeError("commands run within skink.cli.app.SkinkGroup")
    return found


def finite(value: Any) -> Any:
    """`value` with infinities and NaNs as text: JSON has no numbers for them."""
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class NoteHandler(logging.Handler):
    """Skink's own warnings, as notes."""

    def __init__(self, session: Session) -> None:
        super().__init__(logging.WARNING)
        self._session = session

    def emit(self, record: logging.LogRecord) -> None:
        self._session.note(record.getMessage())
