"""One run: the limit, level 3, and what a snapshot is taken of."""

from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from torch import nn

from skink.errors import OutputError, VerifyError
from skink.graph.capture import capture
from skink.graph.passes import Context, PassResult
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program, Stage
from skink.graph.rewriter import Rewriter
from skink.passes.canonicalize import Canonicalize
from tests.graph.scaling import Scale
from tests.modules import One
from tests.programs import captured

aten = torch.ops.aten


class Yields(Scale):
    """Promises a stage."""

    name: ClassVar[str] = "yields"
    yields: ClassVar[Stage | None] = Stage.REWRITTEN
    exactness: ClassVar[Literal["exact", "approximate"]] = "approximate"

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        return super().run(program, rewriter, context)


def layers() -> Program:
    body = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    return capture(One(lambda self, x: self.body_(x), body_=body), (torch.randn(3, 4),))


def scaled(program: Program) -> int:
    return len(program.graph.find_nodes(op="call_function", target=aten.mul.Tensor))


@pytest.mark.parametrize("limit", range(6))
def test_no_more_edits_are_made_than_the_limit_allows(limit: int) -> None:
    program = layers()
    done = Pipeline((Scale(factors=(1.0,) * 4), Scale())).attempt(program, limit=limit)
    assert done.error is None
    assert len(program.edits) == scaled(program) == min(limit, 4)
    assert len(done.result.passes) == (0 if limit == 0 else 1 if limit <= 4 else 2)


def test_a_pass_that_the_limit_cut_short_leaves_no_stage() -> None:
    for limit, stage in ((1, Stage.CAPTURED), (4, Stage.CAPTURED), (5, Stage.REWRITTEN), (None, Stage.REWRITTEN)):
        program = layers()
        Pipeline((Yields(factors=(1.0,) * 4),)).attempt(program, limit=limit)
        assert program.stage is stage


def test_a_canonical_form_cut_short_is_legal_and_exact() -> None:
    whole = captured("llama")
    Pipeline((Canonicalize(),)).attempt(whole)
    for limit in (0, 1, len(whole.edits) // 2, len(whole.edits), len(whole.edits) + 1):
        program = captured("llama")
        done = Pipeline((Canonicalize(),)).attempt(program, limit=limit)
        assert done.error is None, done.error
        assert program.edits == whole.edits[:limit]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_after_every_edit_a_program_runs_and_gives_the_same_numbers(family: str) -> None:
    program = captured(family)
    done = Pipeline((Canonicalize(),)).attempt(program, verify=3)
    assert done.error is None, done.error
    assert max(edit.error for edit in program.edits) < 1e-5


def test_level_3_measures_every_edit() -> None:
    program = layers()
    Pipeline((Yields(factors=(1.0, 1.5, 1.0, 0.5)),)).run(program, verify=3)
    errors = [edit.error for edit in program.edits]
    assert errors[0] == 0
    assert errors[1] == errors[2] > 1e-3
    assert errors[3] != errors[2]
    Pipeline((Yields(factors=(1.0, 1.5)),)).run(unmeasured := layers(), verify=2)
    assert [edit.error for edit in unmeasured.edits] == [None, None]


def test_level_3_names_the_edit_that_changed_the_numbers() -> None:
    with pytest.raises(VerifyError, match="VERIFY-002") as caught:
        Pipeline((Scale(factors=(1.0, 1.0, 2.0)),)).run(layers(), verify=3)
    assert caught.value.where.startswith("edit 2, scale of %linear_2, body_.2 (")


def test_dumps_of_one_pipeline_after_another_are_numbered_on(tmp_path: Path) -> None:
    program = layers()
    for entry in (Scale(factors=(1.0,)), Yields(factors=(2.0,))):
        Pipeline((entry,)).attempt(program, dump=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00_scale.txt", "01_yields.txt", "edits.jsonl"]
    assert len((tmp_path / "edits.jsonl").read_text().splitlines()) == 2


def test_a_dump_that_cannot_be_written_is_no_fault_of_the_pass(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = Pipeline((Scale(factors=(1.0,)),)).attempt(layers(), dump=tmp_path / "file")
    assert isinstance(done.error, OutputError)
    assert "[OUTPUT-002] cannot write to the folder that SKINK_DUMP names" in str(done.error)


def test_what_is_kept_for_a_reproducer_is_taken_before_each_pass_that_follows_a_change() -> None:
    pipeline = Pipeline((Scale(factors=(1.0,)), Canonicalize(), Scale(factors=(1.0, 3.0))))
    done = pipeline.attempt(layers())
    assert (done.index, done.failure.pass_name) == (2, "scale")
    assert scaled(done.start.program()) == 0
    assert done.before.program().stage is Stage.CANONICAL
    first = Pipeline((Scale(factors=(3.0,)),)).attempt(layers())
    assert first.start is first.before
