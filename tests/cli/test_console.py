import io
import json
import math
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.text import Text

from skink.cli.console import Session, finite
from skink.errors import OptionError


def _session(*, as_json: bool, terminal: bool = False) -> Session:
    out, err = io.StringIO(), io.StringIO()
    return Session(as_json, out, Console(file=out), Console(file=err, force_terminal=terminal, width=40))


def _errors(session: Session) -> str:
    file = session.err.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


ERROR = OptionError("OPTION-002", "keep=[2] is out of range " * 4, where="here", why="because", fix="mend it.")


def test_numbers_that_json_lacks_become_text() -> None:
    given = {"a": [math.inf, -math.inf, 1.5], "b": {"c": math.nan}, "d": "text", "e": (1, None)}
    assert finite(given) == {"a": ["Infinity", "-Infinity", 1.5], "b": {"c": "NaN"}, "d": "text", "e": [1, None]}


def test_of_several_processes_the_first_is_heard(
    set_environment: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for process in ("1", "0"):
        set_environment(RANK=process)
        session = Session.start(as_json=False)
        session.show("a result")
        session.note("a note")
        said = capsys.readouterr()
        assert bool(said.out) == bool(said.err) == (process == "0")


def test_an_error_is_printed_as_it_is_and_unbroken() -> None:
    session = _session(as_json=False)
    session.fail(ERROR)
    assert _errors(session) == f"{ERROR}\n"


def test_colour_is_for_terminals() -> None:
    session = _session(as_json=False, terminal=True)
    session.fail(ERROR)
    assert "\x1b[1;31m[OPTION-002]" in _errors(session)


def test_an_error_as_json_has_its_parts() -> None:
    session = _session(as_json=True)
    session.fail(ERROR)
    assert isinstance(session.stdout, io.StringIO)
    assert json.loads(session.stdout.getvalue()) == {"error": ERROR.as_json()}


def test_text_is_never_taken_for_markup() -> None:
    session = _session(as_json=False)
    session.show("h[0] [bold]x[/bold]", Text("long " * 40))
    assert isinstance(session.stdout, io.StringIO)
    assert session.stdout.getvalue() == f"h[0] [bold]x[/bold]\n{'long ' * 40}\n"
