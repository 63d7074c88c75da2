import json

from skink.training.loop.state import LossScale, RunState


def test_it_comes_back_from_json() -> None:
    state = RunState(step=3, tokens=90, losses=[(30, 0.1), (60, 1 / 3)], terms={"ce": [0.1, 0.2]})
    state.evaluated(1.5, patience=2)
    assert RunState.from_dict(json.loads(json.dumps(state.as_dict()))) == state


def test_patience_counts_evaluations_without_a_better_loss() -> None:
    state = RunState()
    better = [state.evaluated(loss, patience=2) for loss in (3.0, 2.0, 2.5, 1.9, 1.9)]
    assert better == [True, True, False, True, False]
    assert not state.stopped
    assert not state.evaluated(2.0, patience=2)
    assert state.stopped
    assert state.best == (0, 1.9)


def test_without_patience_it_never_stops() -> None:
    state = RunState()
    for loss in (1.0, *[2.0] * 9):
        state.evaluated(loss, patience=0)
    assert not state.stopped


def test_the_scale_halves_on_overflow_and_doubles_after_long_peace() -> None:
    scale = LossScale()
    scale.update(finite=False)
    assert scale.value == 2.0**15
    for _ in range(2000):
        scale.update(finite=True)
    assert scale == LossScale(2.0**16, 0)
