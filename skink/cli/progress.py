"""How far a command has come: bars on a terminal, short lines where stderr is a file."""

import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from skink.cli.console import Session
from skink.export.report.formatting import seconds

# Without a terminal, a phase that goes on says so this often, in seconds.
_SAY_AGAIN = 15.0


class PhaseProgress:
    """One bar, or one line, for each phase; to be called as (phase, done, total). A phase may come again."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._begun: dict[str, float] = {}
        self._said: dict[str, float] = {}
        self._finished: set[str] = set()
        self._tasks: dict[str, TaskID] = {}
        self._phase = ""
        self._status = ""
        self._bars: Progress | None = None
        if session.err.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}", style="bold"),
                BarColumn(bar_width=24, complete_style="cyan", finished_style="green", pulse_style="cyan"),
                TextColumn("{task.fields[count]}", justify="right"),
                TimeElapsedColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[status]}", style="dim"),
                console=session.err,
            )

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """`done` of `total` units of a phase are done. A phase that begins complete had nothing to do."""
        now = time.monotonic()
        complete = done >= total
        if phase in self._finished and not complete:
            self._forget(phase)
        if phase not in self._begun:
            if complete:
                return
            self._begun[phase] = self._said[phase] = now
        if phase != self._phase:
            self._phase, self._status = phase, ""
        if self._bars is not None:
            self._draw(phase, done, total, complete)
        elif complete and phase not in self._finished:
            self._session.note(f"{phase}: done in {seconds(now - self._begun[phase])}")
        elif not complete and now - self._said[phase] >= _SAY_AGAIN:
            self._said[phase] = now
            said = f", {self._status}" if self._status else ""
            self._session.note(f"{phase}: {done:,} of {total:,} after {seconds(now - self._begun[phase])}{said}")
        if complete:
            self._finished.add(phase)

    def say(self, status: str) -> None:
        """What the phase that goes on is at, in a few words: shown behind its bar, or in its next line."""
        self._status = status
        if self._bars is not None and self._phase in self._tasks:
            self._bars.update(self._tasks[self._phase], status=status)

    def _forget(self, phase: str) -> None:
        """A phase begins anew, as the second of two passes of one name does; the bar of the first stays as it is."""
        self._finished.discard(phase)
        for kept in (self._begun, self._said, self._tasks):
            kept.pop(phase, None)

    def _draw(self, phase: str, done: int, total: int, complete: bool) -> None:
        bars = self._bars
        if bars is None:
            return
        if phase not in self._tasks:
            self._tasks[phase] = bars.add_task(phase, total=None, count="", status="")
        # A phase of one step has no share done to show: its bar pulses until it is.
        bars.update(
            self._tasks[phase],
            total=total if total > 1 or complete else None,
            completed=done,
            count=f"{done:,}/{total:,}" if total > 1 else "",
            refresh=complete,
        )
