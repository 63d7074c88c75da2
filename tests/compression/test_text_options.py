"""How text is cut: what is out of range, and what has no effect."""

from typing import Any

import pytest

from skink.compression import TextOptions, TrainingTextOptions
from skink.errors import OptionError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, r"training length=1 is out of range"),
        ({"packing": "dense"}, r"training packing='dense' is none that is known"),
        ({"dtype": "float32"}, r"training dtype='float32' is none that is read"),
    ],
)
def test_what_is_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=rf"\[OPTION-002\] {message}"):
        TrainingTextOptions(**options)


@pytest.mark.parametrize("name", ["calibration_windows", "held_out_windows", "length"])
def test_windows_and_their_length_are_positive(name: str) -> None:
    with pytest.raises(OptionError, match=rf"\[OPTION-002\] {name}=0 is out of range"):
        TextOptions(**{name: 0})


def test_what_was_said_can_be_refused() -> None:
    assert not TrainingTextOptions().said
    options = TrainingTextOptions(field="answer")
    assert options.said
    options.refuse("packing", "dtype", why="it is nothing of that")
    with pytest.raises(OptionError, match=r"training field='answer' does not go with this text.\n  it has no rows."):
        options.refuse("packing", "field", why="it has no rows")
