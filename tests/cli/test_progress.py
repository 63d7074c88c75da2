import io

import pytest
from rich.console import Console

from skink.cli import progress as module
from skink.cli.console import Session
from skink.cli.progress import PhaseProgress


def _session(*, terminal: bool) -> tuple[Session, io.StringIO]:
    err = io.StringIO()
    return Session(False, io.StringIO(), Console(file=io.StringIO()), Console(file=err, force_terminal=terminal)), err


class _Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    found = _Clock()
    monkeypatch.setattr(module, "time", found)
    return found


def test_without_a_terminal_each_phase_is_a_line(clock: _Clock) -> None:
    session, err = _session(terminal=False)
    with PhaseProgress(session) as progress:
        progress("load", 0, 1)
        clock.now = 2.5
        progress("load", 1, 1)
        progress("load", 1, 1)
    assert err.getvalue() == "load: done in 2.50 s\n"


def test_a_long_phase_says_so_now_and_then(clock: _Clock) -> None:
    session, err = _session(terminal=False)
    with PhaseProgress(session) as progress:
        for done in range(5):
            clock.now = done * 10.0
            progress("low-rank", done, 5)
    assert err.getvalue() == "low-rank: 2 of 5 after 20.0 s\nlow-rank: 4 of 5 after 40.0 s\n"


def test_a_phase_without_work_is_not_shown() -> None:
    session, err = _session(terminal=False)
    with PhaseProgress(session) as progress:
        progress("compare", 1, 1)
    assert err.getvalue() == ""


def test_a_terminal_gets_bars_with_counts() -> None:
    session, err = _session(terminal=True)
    with PhaseProgress(session) as progress:
        for done in range(4):
            progress("perplexity", done, 3)
    shown = err.getvalue()
    assert "perplexity" in shown
    assert "0:00:0" in shown
    assert shown.endswith("\x1b[?25h")  # the cursor is back
