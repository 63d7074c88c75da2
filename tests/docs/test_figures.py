"""A figure in the documentation stands beside the command that printed it."""

import re

import pytest

from tests.docs.pages import Page, pages

# Numbers that only a measurement gives.
_MEASURED = re.compile(
    r"\d(?:[\d.,]*)\s?(?:tok/s|tokens/s|tokens per second|ms\b|µs|GB/s|seconds\b|\u00d7 (?:faster|slower))"
    r"|perplexity (?:of |is |was )?\d|\d[\d.]* (?:times|x) (?:faster|slower)",
)
_COMMAND = re.compile(r"^```(?:sh|bash|console)?\n(?:\$ )?(?:make|skink|python|\.venv/bin/python) ", re.MULTILINE)


def _sections(entry: Page) -> list[str]:
    return re.split(r"^#+ .+$", entry.text, flags=re.MULTILINE)


# The page of the model that ships came with it, and says itself how its numbers were made.
_OURS = [entry for entry in pages() if not entry.path.startswith("skink/assets/")]


@pytest.mark.parametrize("entry", _OURS, ids=lambda entry: entry.path)
def test_figures_have_a_command(entry: Page) -> None:
    bare = [
        match[0]
        for section in _sections(entry)
        if not _COMMAND.search(section)
        for match in _MEASURED.finditer(re.sub(r"`[^`\n]*`", "", section))
    ]
    assert not bare


@pytest.mark.parametrize(
    "text", ["it reads 30 GB/s", "decode is 2.1 times faster", "a perplexity of 7.45", "1,234 tok/s"]
)
def test_figures_are_recognised(text: str) -> None:
    assert _MEASURED.search(text)
