"""What is Python, and what is not."""

import warnings

import pytest

from skink.evaluation.python_source import parsed


def test_invalid_escapes_of_old_source_are_no_matter() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parsed("pattern = '\\d'\n") is not None


@pytest.mark.parametrize("text", ["This is prose.", "x = \0", "(" * 10_000, "-" * 200_000 + "1"])
def test_what_is_not_python_has_no_tree(text: str) -> None:
    assert parsed(text) is None
