"""Bisect: the edit that is found, what is said about it, and when there is nothing to find."""

from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from skink.errors import BisectError, OptionError
from skink.graph.bisect import BisectResult, bisect
from skink.graph.capture import capture
from skink.graph.failure import Failure
from skink.graph.passes import Context, PassResult
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.graph.rewriter import Rewriter
from skink.passes.canonicalize import Canonicalize
from tests.graph.scaling import Scale
from tests.modules import One
from tests.programs import canonical, captured

aten = torch.ops.aten
LAYERS = 12


class Rough(Scale):
    """The same, and says that it is approximate."""

    name: ClassVar[str] = "rough"
    exactness = "approximate"


class Breaks(Scale):
    """Makes one edit more, which leaves what no stage allows."""

    name: ClassVar[str] = "breaks"

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        super().run(program, rewriter, context)
        node = program.graph.find_nodes(op="call_function", target=aten.linear.default)[-1]
        with rewriter.before(node):
            written = rewriter.call(aten.relu.default, node.args[0], rule="write")
        written.target = aten.relu_.default
        rewriter.update(node, args=(written, *node.args[1:]), rule="write-in-place")
        return PassResult(edits=rewriter.count)


@pytest.fixture(scope="module")
def program() -> Program:
    body = nn.Sequential(*(nn.Linear(4, 4) for _ in range(LAYERS)))
    return capture(One(lambda self, x: self.body_(x), body_=body), (torch.randn(3, 4),))


def wrong_at(index: int, factor: float = 2.0) -> tuple[float, ...]:
    return (1.0,) * index + (factor,) + (1.0,) * (LAYERS - index - 1)


@pytest.mark.parametrize("index", range(LAYERS))
def test_the_wrong_one_among_many_is_found_wherever_it_is(program: Program, index: int) -> None:
    found = bisect(program, Pipeline((Scale(factors=wrong_at(index)),)))
    assert found.edit is not None
    assert (found.edit.index, found.edit.rule, found.edit.qualified_name) == (index, "scale", f"body_.{index}")
    assert found.edits == LAYERS
    assert found.runs <= 6
    assert found.error_before == 0 < found.error_after
    assert found.failure.startswith("[VERIFY-002] pass scale calls itself exact")


def test_what_changed_is_shown(program: Program) -> None:
    text = str(program)
    found = bisect(program, Pipeline((Scale(factors=wrong_at(3)),)))
    assert str(program) == text
    assert found.before.count("aten.mul.Tensor") == 3
    assert found.diff(context=0).splitlines()[3:] == [
        "-  %linear_4 : f32[B,4] = aten.linear(%linear_3, @body_.4.weight, @body_.4.bias)",
        "+  %mul_tensor_3 : f32[B,4] = aten.mul.Tensor(%linear_3, 2.0)  # scale",
        "+  %linear_4 : f32[B,4] = aten.linear(%mul_tensor_3, @body_.4.weight, @body_.4.bias)",
    ]


@given(st.lists(st.sampled_from([1.0, 1.0, 1.0, 1.5, 0.5]), min_size=1, max_size=LAYERS))
def test_of_several_wrong_ones_the_edit_found_is_one_of_them(program: Program, factors: list[float]) -> None:
    pipeline = Pipeline((Scale(factors=tuple(factors)),))
    if all(factor == 1.0 for factor in factors):
        with pytest.raises(BisectError):
            bisect(program, pipeline)
        return
    found = bisect(program, pipeline)
    assert factors[found.edit.index] != 1.0
    assert found.error_before != found.error_after


def test_the_edit_that_lifts_the_error_above_a_bound(program: Program) -> None:
    pipeline = Pipeline((Rough(factors=(1.0, 1.001, 1.0, 1.0, 1.3, 1.0, 1.01)),))
    small = bisect(program, pipeline, error_above=0.0)
    large = bisect(program, pipeline, error_above=small.error_after * 2)
    assert (small.edit.index, large.edit.index) == (1, 4)
    assert large.error_before <= small.error_after * 2 < large.error_after
    assert f"above {small.error_after * 2:g}" in large.failure


def test_a_run_that_breaks_under_the_limit_has_no_error_that_is_too_large(program: Program) -> None:
    class Clumsy(Rough):
        name: ClassVar[str] = "clumsy"

        def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
            result = super().run(program, rewriter, context)
            if rewriter.exhausted and rewriter.count < 3:
                raise RuntimeError("under a limit")
            return result

    found = bisect(program, Pipeline((Clumsy(factors=wrong_at(5)),)), error_above=0.001)
    assert found.edit.index == 5
    assert found.failure.startswith("the relative error is")


def test_the_structure_is_bisected_too(program: Program) -> None:
    found = bisect(program, Pipeline((Breaks(factors=(1.0,) * 5),)))
    assert (found.edit.index, found.edit.rule) == (5, "write-in-place")
    assert found.failure.startswith("[VERIFY-001] after pass breaks: aten.relu_.default, which writes to its argument")
    assert "aten.relu_" in found.diff()


def test_a_pass_that_raises_by_itself_is_blamed_and_no_edit(program: Program) -> None:
    found = bisect(program, Pipeline((Scale(factors=(1.0, 1.0, 1.0, 0.0)),)))
    assert found.edit is None
    assert (found.pass_name, found.edits) == ("scale", 3)
    assert found.failure == "ZeroDivisionError: a factor of zero"
    assert found.error_after == 0


def test_all_passes_count_as_one_row_of_edits() -> None:
    program = captured("llama")
    count = len(canonical("llama").edits)
    found = bisect(program, Pipeline((Canonicalize(), Scale(factors=wrong_at(2)))))
    assert (found.edit.index, found.edit.pass_name) == (count + 2, "scale")
    assert found.edit.source


def test_indices_go_on_from_edits_made_before() -> None:
    program = canonical("llama")
    count = len(program.edits)
    found = bisect(program, Pipeline((Scale(factors=wrong_at(1)),)))
    assert (found.first, found.edit.index, found.edits) == (count, count + 1, LAYERS)


def test_another_failure_is_not_the_one_looked_for(program: Program) -> None:
    pipeline = Pipeline((Scale(factors=wrong_at(4)),))
    other = Failure("VerifyError", "VERIFY-001", "scale", "[VERIFY-001] what it was")
    with pytest.raises(
        BisectError, match=r"\[BISECT-001\] the pipeline fails in another way: \[VERIFY-002\]"
    ) as caught:
        bisect(program, pipeline, failure=other)
    assert caught.value.why == "looked for: [VERIFY-001] what it was"


def test_runs_that_fail_otherwise_count_as_fine_and_are_counted(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Pipeline.attempt

    def sometimes(self: Pipeline, *args: Any, limit: int | None = None, **options: Any) -> Any:
        done = attempt(self, *args, limit=limit, **options)
        if limit is None or limit > 4:
            return done
        object.__setattr__(done, "failure", Failure("KeyError", "", "scale", "KeyError: limit") if limit else None)
        return done

    monkeypatch.setattr(Pipeline, "attempt", sometimes)
    found: BisectResult = bisect(program, Pipeline((Scale(factors=wrong_at(5)),)))
    assert found.edit.index == 5
    assert found.otherwise > 0


def test_a_pipeline_without_fault_has_nothing_to_find(program: Program) -> None:
    pipeline = Pipeline((Scale(factors=(1.0,) * LAYERS),))
    with pytest.raises(BisectError, match=r"\[BISECT-001\] the pipeline runs to its end, with 12 edits") as caught:
        bisect(program, pipeline)
    assert "--error-above" in caught.value.fix
    with pytest.raises(BisectError, match=r"\[BISECT-001\] with all 12 edits the error is 0.00e\+00, not above 0.1"):
        bisect(program, pipeline, error_above=0.1)


def test_a_program_at_fault_from_the_start_is_said_to_be(program: Program) -> None:
    broken = program.clone()
    broken.outputs = ("one", "two")
    with pytest.raises(BisectError, match=r"\[BISECT-001\] the check fails before any edit is made") as caught:
        bisect(broken, Pipeline((Scale(factors=(1.0,)),)))
    assert "no rewrite is" in caught.value.fix


def test_a_bound_below_zero_is_refused(program: Program) -> None:
    with pytest.raises(OptionError, match="OPTION-002"):
        bisect(program, Pipeline(()), error_above=-1.0)


def test_programs_without_values_are_bisected_by_structure() -> None:
    with torch.device("meta"):
        body = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    found = bisect(capture(body, (torch.zeros(3, 4),)), Pipeline((Breaks(factors=(2.0, 2.0)),)))
    assert (found.edit.index, found.error_before, found.error_after) == (2, None, None)


def test_progress_comes_to_its_end(program: Program) -> None:
    seen: list[tuple[int, int]] = []
    bisect(program, Pipeline((Scale(factors=wrong_at(7)),)), progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
