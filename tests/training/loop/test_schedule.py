import pytest

from skink.training.loop.schedule import Schedule, learning_rate


def rates(steps: int, schedule: Schedule = "cosine", *, warmup: float = 0.0, final: float = 0.1) -> list[float]:
    return [
        learning_rate(step, steps, peak=2.0, schedule=schedule, warmup=warmup, final=final) for step in range(steps)
    ]


def test_it_rises_to_the_peak_and_falls_to_the_final_share() -> None:
    found = rates(20, warmup=0.2)
    assert found[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert found[4:] == sorted(found[4:], reverse=True)
    assert found[-1] == pytest.approx(0.2)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert rates(5, final=0.0) == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5, 0.0])


def test_linear_falls_by_equal_steps() -> None:
    assert rates(5, "linear", final=0.0) == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])


def test_constant_stays_at_the_peak_after_the_rise() -> None:
    assert rates(4, "constant", warmup=0.25) == pytest.approx([1.0, 2.0, 2.0, 2.0])


@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_a_run_of_one_step_learns(warmup: float) -> None:
    [rate] = rates(1, warmup=warmup)
    assert 0 < rate <= 2.0
