import pytest

from skink.training.loop.pace import Pace


def pace(seconds: list[float]) -> Pace:
    times = iter(seconds)
    return Pace(clock=lambda: next(times))


@pytest.mark.parametrize(
    ("tokens", "left", "said"),
    [
        (500, 1_000, "loss 2.134 · 500 tokens/s · 2 s left"),
        (12_300, 2_952_000, "loss 2.134 · 12.3k tokens/s · 4 min left"),
        (2_000_000, 20_000_000_000, "loss 2.134 · 2.0M tokens/s · 2 h 46 min left"),
    ],
)
def test_what_it_says(tokens: int, left: int, said: str) -> None:
    found = pace([0.0, 1.0])
    found.add(tokens)
    assert found.text(2.1342, left) == said


def test_the_rate_is_smooth() -> None:
    found = pace([0.0, 1.0, 2.0])
    found.add(1000)
    found.add(2000)
    assert "1.1k tokens/s" in found.text(1.0, 0)


def test_before_the_first_step_there_is_no_rate() -> None:
    assert pace([0.0]).text(1.0, 100) == "loss 1.000"
