"""docs/errors.md has a section for each code, with an example as the code prints it."""

import re
from pathlib import Path

import pytest

from skink.errors import CODES, SkinkError
from tests.docs.examples import EXAMPLES
from tests.docs.pages import page

PAGE = page("docs/errors.md")


def test_every_code_has_a_section_and_every_section_a_code() -> None:
    assert list(PAGE.sections()) == list(CODES)


def test_the_anchor_is_what_messages_name() -> None:
    assert {code.lower() for code in CODES} <= PAGE.anchors()


@pytest.mark.parametrize("code", CODES)
def test_every_section_says_what_it_is_and_shows_a_message(code: str) -> None:
    section = PAGE.sections()[code]
    assert re.match(r"\n\n\*\*[A-Z`].+?\.\*\*", section)
    example = _example(code)
    assert example.startswith(f"[{code}] ")
    assert example.rstrip().endswith(f"docs/errors.md#{code.lower()}")


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_example_is_what_is_printed(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SkinkError) as caught:
        EXAMPLES[code]()
    assert caught.value.code == code
    assert _comparable(str(caught.value), str(tmp_path)) == _comparable(_example(code), str(tmp_path))


def _example(code: str) -> str:
    return next(block.text for block in PAGE.blocks() if block.heading == code and not block.language)


def _comparable(text: str, folder: str) -> str:
    """Without folders and line numbers, which differ from machine to machine, and one space for any white space."""
    text = text.replace(folder + "/", "")
    text = re.sub(r"\S*skink_reproducer_[\w\-]+", "FOLDER", text)
    text = re.sub(r"/?(?:[\w.\-]+/)+([\w\-]+\.py)", r"\1", text)
    text = re.sub(r"\w+\.py:\d+", "FILE:LINE", text)
    text = re.sub(r"announces \d+", "announces N", text)
    return " ".join(text.split())
