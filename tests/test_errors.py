"""Errors: their form, and that every code is raised, tested and documented."""

import re
from pathlib import Path

import pytest

from skink import errors
from skink.errors import CODES, CaptureError, OptionError, RecipeError, SkinkError, check_range, suggest

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def test_the_text_says_what_where_why_and_how_to_mend() -> None:
    error = SkinkError("STATE-001", "No kernel.", where="%x, layer (m.py:3)", why="one: no\ntwo: no", fix="cast it.")
    assert str(error).splitlines() == [
        "[STATE-001] No kernel.",
        "  at %x, layer (m.py:3)",
        "  one: no",
        "  two: no",
        "  fix: cast it. docs/errors.md#state-001",
    ]


def test_what_is_not_known_is_left_out() -> None:
    assert str(CaptureError("CAPTURE-001", "Two are one.")) == (
        "[CAPTURE-001] Two are one.\n  see docs/errors.md#capture-001"
    )


def test_parts_for_programs() -> None:
    error = SkinkError("INPUT-001", "a", where="b", why="c", fix="d")
    assert error.as_json() == {"code": "INPUT-001", "what": "a", "where": "b", "why": "c", "fix": "d"}


def test_codes_must_be_registered() -> None:
    with pytest.raises(KeyError, match="'NEW-001' is not in"):
        SkinkError("NEW-001", "text")


def test_option_and_recipe_errors_are_value_errors() -> None:
    assert issubclass(OptionError, ValueError)
    assert issubclass(RecipeError, ValueError)


@pytest.mark.parametrize(
    ("name", "valid", "text"),
    [
        ("kep", ["keep", "method"], "did you mean 'keep'? valid: keep, method."),
        ("zzz", ["keep", "method"], "valid: keep, method."),
        ("keep", [], "valid: none."),
    ],
)
def test_suggestions(name: str, valid: list[str], text: str) -> None:
    assert suggest(name, valid) == text


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_values_in_range_pass(value: float) -> None:
    check_range("keep", value, low=0.0, high=1.0)


@pytest.mark.parametrize(
    ("value", "open_low", "open_high", "interval"),
    [
        (-0.1, False, False, "[0, 1]"),
        (0.0, True, False, "(0, 1]"),
        (1.0, False, True, "[0, 1)"),
        (1.1, True, True, "(0, 1)"),
        (float("nan"), False, False, "[0, 1]"),
        (True, False, False, "[0, 1]"),
    ],
)
def test_values_out_of_range_are_refused(value: float, open_low: bool, open_high: bool, interval: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_range("keep", value, low=0.0, high=1.0, open_low=open_low, open_high=open_high)
    assert str(caught.value).splitlines() == [
        f"[OPTION-002] keep={value!r} is out of range {interval}.",
        f"  fix: choose keep in {interval}. docs/errors.md#option-002",
    ]


@pytest.mark.parametrize("code", CODES)
def test_every_code_is_raised_somewhere(code: str) -> None:
    package = Path(errors.__file__).parent
    raised = [path for path in package.rglob("*.py") if f'"{code}"' in path.read_text() and path.name != "errors.py"]
    assert raised, f"nothing in skink raises {code}: drop it from CODES"


@pytest.mark.parametrize("code", CODES)
def test_every_code_is_tested(code: str) -> None:
    named = [
        path
        for path in TESTS.rglob("test_*.py")
        if code in path.read_text() and path.relative_to(TESTS).parts[0] not in ("docs", "test_errors.py")
    ]
    assert named, f"no test mentions {code}"


@pytest.mark.parametrize("code", CODES)
def test_every_code_is_documented(code: str) -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    assert re.search(rf"^#+ {code}\b", page, re.MULTILINE), f"docs/errors.md has no section {code}"
