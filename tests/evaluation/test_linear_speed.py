"""The linear layers of a program, timed by themselves."""

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from skink.errors import OptionError
from skink.evaluation import linear_speed
from skink.evaluation.linear_speed import measure_linear
from skink.evaluation.speed import Spread
from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program, Stage
from skink.kernels.cpp.library import library
from skink.passes.decompose import LowRank
from tests.graph.programs import canonical


@pytest.fixture(scope="module")
def factored() -> Program:
    program = canonical("llama").clone()
    Pipeline((LowRank(method="plain", keep=0.5),), start=Stage.CANONICAL).run(program)
    return program


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], ...]]:
    """Shapes of (input, weight) of every call that is timed from now on."""
    seen: list[tuple[tuple[int, ...], ...]] = []
    found = linear_speed._calls

    def calls(*args):
        def watch(call):
            def run(given, weight, *rest, **options):
                seen.append((tuple(given.shape), tuple(weight.shape)))
                return call.target(given, weight, *rest, **options)

            return dataclasses.replace(call, target=run)

        return [watch(call) for call in found(*args)]

    monkeypatch.setattr(linear_speed, "_calls", calls)
    return seen


def test_every_linear_layer_but_the_head_runs_on_the_prompt_and_on_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [tuple(tensor.shape) for name, tensor in canonical("llama").weights() if "_proj" in name]
    seen = watched(monkeypatch)
    measure_linear({"dense": canonical("llama")}, batch=2, prompt=5, output=3, rounds=1)
    assert len(weights) == 14
    turn = [((2, 5, shape[1]), shape) for shape in weights] + [((2, 1, shape[1]), shape) for shape in weights] * 8
    assert seen == turn * 2


def test_seconds_are_the_prompt_once_and_a_step_for_each_token() -> None:
    ticks = itertools.count()
    found = measure_linear({"dense": canonical("llama")}, output=4, rounds=3, clock=lambda: float(next(ticks)))
    # One second for each thing timed; eight steps are timed as one thing.
    assert found == {"dense": Spread(1.5, 1.5, 1.5)}


def test_programs_take_turns_and_the_first_turn_does_not_count(factored: Program) -> None:
    now = iter([0, 100, 0, 100, 0, 1, 0, 2, 0, 3, 0, 8])
    done: list[tuple[int, int]] = []
    found = measure_linear(
        {"dense": canonical("llama"), "factored": factored},
        output=0,
        rounds=2,
        clock=lambda: float(next(now)),
        progress=lambda *steps: done.append(steps),
    )
    assert found == {"dense": Spread(2.0, 1.0, 3.0), "factored": Spread(5.0, 2.0, 8.0)}
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_without_output_nothing_is_stepped() -> None:
    # No decoder at all.
    program = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.zeros(1, 4),))
    assert measure_linear({"a": program}, output=0, rounds=1)["a"].median > 0


@pytest.mark.parametrize("name", ["batch", "prompt", "rounds", "output"])
def test_options_out_of_range(name: str) -> None:
    with pytest.raises(OptionError, match=rf"OPTION-002.*{name}"):
        measure_linear({}, **{name: -1})


def test_what_puts_a_layer_of_several_together_counts_too(set_environment: Callable[..., None]) -> None:
    program = canonical("llama").clone()
    Pipeline((LowRank(method="plain", keep=0.5, form="pivoted"),), start=Stage.CANONICAL).run(program)
    if library().available:
        names = [call.name for call in linear_speed._calls(program, program)]
        assert len(names) == sum(name.startswith("pivoted_linear") for name in names) == 14
    set_environment(SKINK_KERNELS="reference")
    names = [call.name for call in linear_speed._calls(program, program)]
    assert sum(name.startswith("cat") for name in names) == 14
    assert sum(name.startswith("index_select") for name in names) == 14
    assert measure_linear({"pivoted": program}, output=1, rounds=1)["pivoted"].median > 0


def test_results_are_let_go_when_nothing_reads_them_any_more() -> None:
    program = canonical("llama").clone()
    Pipeline((LowRank(method="plain", keep=0.5, form="pivoted"),), start=Stage.CANONICAL).run(program)
    calls = linear_speed._calls(program, program)
    assert sorted(name for call in calls for name in call.last) == sorted(call.name for call in calls)
