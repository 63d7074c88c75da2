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


def test_a_phase_may_come_again(clock: _Clock) -> None:
    session, err = _session(terminal=False)
    with PhaseProgress(session) as progress:
        for begun in (0.0, 10.0):
            clock.now = begun
            progress("recover", 0, 4)
            clock.now = begun + 2
            progress("recover", 4, 4)
            progress("recover", 1, 1)
    assert err.getvalue() == "recover: done in 2.00 s\nrecover: done in 2.00 s\n"


def test_what_a_phase_is_at_stands_in_its_lines(clock: _Clock) -> None:
    session, err = _session(terminal=False)
    with PhaseProgress(session) as progress:
        progress("recover", 0, 5000)
        progress.say("loss 2.5")
        clock.now = 20.0
        progress("recover", 1000, 5000)
        progress("perplexity", 0, 3)
        clock.now = 40.0
        progress("perplexity", 1, 3)
    assert err.getvalue() == ("recover: 1,000 of 5,000 after 20.0 s, loss 2.5\nperplexity: 1 of 3 after 20.0 s\n")


def test_what_a_phase_is_at_stands_behind_its_bar() -> None:
    session, err = _session(terminal=True)
    session.err.width = 160
    with PhaseProgress(session) as progress:
        progress.say("nothing goes on")
        progress("recover", 0, 3)
        progress.say("loss 2.5")
        progress("recover", 3, 3)
    assert "loss 2.5" in err.getvalue()
    assert "nothing goes on" not in err.getvalue()


def test_a_terminal_gets_bars_with_counts() -> None:
    session, err = _session(terminal=True)
    with PhaseProgress(session) as progress:
        for done in range(4):
            progress("perplexity", done, 3)
    shown = err.getvalue()
    assert "perplexity" in shown
    assert "0:00:0" in shown
    assert shown.endswith("\x1b[?25h")  # the cursor is back
