"""Pipelines: order, verification, records, dumps."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import fx, nn

from skink.errors import CalibrationError, RecipeError, RecoveryError, VerifyError
from skink.graph.capture import capture
from skink.graph.passes import Context, LayerRecord, Pass, PassResult
from skink.graph.pattern import NoMatch
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program, Stage
from skink.graph.rewriter import Rewriter
from skink.graph.serialization import program_from_json, program_to_json
from skink.graph.windows import Windows
from skink.passes.canonicalize import Canonicalize
from tests.modules import One
from tests.programs import canonical, captured

aten = torch.ops.aten


@dataclass(frozen=True)
class Change(Pass):
    """Multiplies the first linear layer's result by `factor`."""

    name: ClassVar[str] = "change"
    summary: ClassVar[str] = "for tests"
    requires: ClassVar[Stage] = Stage.CAPTURED
    exactness: ClassVar[Literal["exact", "approximate"]] = "exact"

    factor: float = 1.0

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        node = linear(program)
        if self.factor == 1.0:
            return PassResult(edits=0, refused=(NoMatch("the factor is one", node),))
        with program.graph.inserting_after(node):
            new = rewriter.call(aten.mul.Tensor, node, self.factor)
        rewriter.replace(node, new, rule="scale")
        context.progress(1, 2)
        return PassResult(edits=1, layers=(LayerRecord("layer", "linear", (4, 4), "scaled", 16, 16),))


@dataclass(frozen=True)
class Approximate(Change):
    """The same, and says so."""

    name: ClassVar[str] = "approximate"
    exactness: ClassVar[Literal["exact", "approximate"]] = "approximate"
    requires: ClassVar[Stage] = Stage.CANONICAL
    yields: ClassVar[Stage | None] = Stage.REWRITTEN


@dataclass(frozen=True)
class Breaks(Pass):
    """Breaks the graph in one of several ways."""

    name: ClassVar[str] = "breaks"
    summary: ClassVar[str] = "for tests"
    requires: ClassVar[Stage] = Stage.CAPTURED

    how: str = ""

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        node = linear(program)
        if self.how == "raises":
            raise ZeroDivisionError("in a pass")
        if self.how == "order":
            next(iter(node.users)).append(node)
        elif self.how == "shape":
            with rewriter.before(node):
                rewriter.replace(node, rewriter.call(aten.sum.default, node.args[0]), rule="to-scalar")
        elif self.how == "writes":
            next(iter(node.users)).target = aten.relu_.default
        return PassResult(edits=1)


@dataclass(frozen=True)
class Reads(Change):
    """Needs calibration."""

    name: ClassVar[str] = "reads"

    @property
    def needs_calibration(self) -> bool:
        return True


def linear(program: Program) -> fx.Node:
    return next(node for node in program.graph.nodes if node.target is aten.linear.default)


def program() -> Program:
    return capture(One(lambda self, x: torch.relu(self.layer(x)), layer=nn.Linear(4, 4)), (torch.randn(2, 4),))


def test_stages_are_checked_when_the_pipeline_is_built() -> None:
    Pipeline((Canonicalize(), Approximate(), Change()))
    Pipeline((Approximate(),), start=Stage.CANONICAL)
    with pytest.raises(RecipeError, match=r"\[RECIPE-003\] pass approximate needs stage canonical, and gets captured"):
        Pipeline((Approximate(), Canonicalize()))


def test_a_program_short_of_the_first_stage_is_refused() -> None:
    pipeline = Pipeline((Approximate(),), start=Stage.CANONICAL)
    with pytest.raises(RecipeError, match=r"\[RECIPE-003\].*begins at stage canonical.*is at stage captured"):
        pipeline.run(program())


def test_the_text_is_the_passes_in_order() -> None:
    assert str(Pipeline((Canonicalize(), Approximate(factor=2.0)))) == "canonicalize, approximate{factor=2.0}"


def test_records_of_what_was_done() -> None:
    subject = program()
    seen: list[tuple[str, int, int]] = []
    result = Pipeline((Canonicalize(), Change(), Approximate(factor=2.0))).run(
        subject, progress=lambda name, done, total: seen.append((name, done, total))
    )
    assert subject.stage is Stage.REWRITTEN
    names = [record.pass_.name for record in result.passes]
    assert names == ["canonicalize", "change", "approximate"]
    assert [record.result.edits for record in result.passes] == [0, 0, 1]
    (where, reason), *rest = result.passes[1].rejections()
    assert (where.partition(",")[0].partition(" ")[0], reason, rest) == ("%linear", "the factor is one", [])
    assert [layer.name for layer in result.layers] == ["layer"]
    assert all(record.seconds > 0 and record.verified == 2 for record in result.passes)
    assert result.passes[1].numbers.relative == 0
    assert result.passes[2].numbers.largest == pytest.approx(1.0)
    assert [entry for entry in seen if entry[0] == "approximate"] == [
        ("approximate", 0, 1),
        ("approximate", 1, 2),
        ("approximate", 1, 1),
    ]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("order", "the graph is not well formed"),
        ("shape", "results were f32[B,4] and became f32[]"),
        ("writes", "aten.relu_.default, which writes to its argument"),
    ],
)
def test_a_pass_that_breaks_the_graph_is_named(how: str, message: str) -> None:
    with pytest.raises(VerifyError, match=r"\[VERIFY-001\] after pass breaks: ") as caught:
        Pipeline((Change(), Breaks(how=how))).run(program())
    assert message in caught.value.what


def test_without_verification_structure_goes_unchecked() -> None:
    Pipeline((Breaks(how="writes"),)).run(program(), verify=0)


def test_an_exact_pass_that_changes_numbers_is_caught() -> None:
    with pytest.raises(VerifyError, match=r"\[VERIFY-002\] pass change calls itself exact and changed") as caught:
        Pipeline((Change(factor=1.01),)).run(program())
    assert "by 1.00e-02 of their largest value; rounding would be at most 2e-05" in caught.value.what
    Pipeline((Change(factor=1.01),)).run(program(), verify=1)


def test_an_exact_pass_answers_for_its_own_change_only() -> None:
    passes = (Canonicalize(), Approximate(factor=1.5), Change())
    assert Pipeline(passes).run(program()).passes[2].numbers.largest == pytest.approx(0.5)
    with pytest.raises(VerifyError, match=r"VERIFY-002.*pass change"):
        Pipeline((*passes[:2], Change(factor=1.01))).run(program())


def test_an_exact_pass_that_undoes_an_approximate_one_is_caught() -> None:
    with pytest.raises(VerifyError, match=r"VERIFY-002.*pass change"):
        Pipeline((Canonicalize(), Approximate(factor=1.5), Change(factor=1 / 1.5))).run(program())


def test_an_exception_in_a_pass_shows_the_program() -> None:
    with pytest.raises(ZeroDivisionError, match="in a pass") as caught:
        Pipeline((Breaks(how="raises"),)).run(program())
    shown, folder = caught.value.__notes__
    assert shown.startswith("in pass breaks{how=raises}, on this program:\nprogram captured(%x: f32[B,4])")
    assert "skink bisect" in folder


def test_calibration_is_asked_for_before_anything_runs() -> None:
    subject = program()
    with pytest.raises(CalibrationError, match=r"\[CALIBRATION-002\] pass reads needs calibration text"):
        Pipeline((Canonicalize(), Approximate(factor=2.0), Reads())).run(subject)
    assert subject.stage is Stage.CAPTURED
    Pipeline((Reads(),)).run(subject, calibration=torch.zeros(1, 2, dtype=torch.int64))


def test_level_and_folder_come_from_the_environment(set_environment: Any, tmp_path: Path) -> None:
    set_environment(SKINK_VERIFY="1", SKINK_DUMP=str(tmp_path / "dumps"))
    result = Pipeline((Canonicalize(), Change(), Approximate(factor=2.0))).run(program())
    assert [record.verified for record in result.passes] == [1, 1, 1]
    assert all(record.numbers is None for record in result.passes)
    dump, edits = sorted((tmp_path / "dumps").iterdir())  # what only looked has no dump
    assert (dump.name, edits.name) == ("02_approximate.txt", "edits.jsonl")
    text = dump.read_text()
    assert text.startswith("after approximate{factor=2.0}\n\nprogram rewritten(%x: f32[B,4])\n")
    assert "%mul_tensor : f32[B,4] = aten.mul.Tensor(%linear, 2.0)  # approximate" in text
    assert "@layer.weight : f32[4,4]" in text


def test_a_program_that_fails_verification_is_dumped(set_environment: Any, tmp_path: Path) -> None:
    set_environment(SKINK_DUMP=str(tmp_path))
    with pytest.raises(VerifyError):
        Pipeline((Breaks(how="writes"),)).run(program())
    assert "aten.relu_(%linear)" in (tmp_path / "00_breaks.txt").read_text()


def test_meta_weights_are_verified_as_far_as_they_go() -> None:
    with torch.device("meta"):
        module = nn.Linear(4, 4)
    subject = capture(module, (torch.zeros(2, 4),))
    result = Pipeline((Canonicalize(),)).run(subject, verify=2)
    assert result.passes[0].numbers is None


def test_weights_replaced_since_capture_are_no_defect_of_a_pass() -> None:
    subject = captured("llama")
    for name, weight in list(subject.weights()):
        if name not in subject.buffers:
            subject.set_weight(name, weight.bfloat16())
    result = Pipeline((Canonicalize(),)).run(subject)
    assert result.passes[0].numbers.largest < 0.1
    assert "logits=" in str(subject)
    assert "bf16[B,T,97] = aten.linear(" in str(subject)


def test_a_program_from_a_file_can_be_run_through() -> None:
    original = canonical("llama")
    loaded = program_from_json(program_to_json(original), dict(original.weights()))
    result = Pipeline((Canonicalize(),)).run(loaded)
    assert result.passes[0].result.edits == 0


@pytest.mark.parametrize("limit", [0, 1])
def test_a_pass_that_the_limit_stops_is_named_once(
    set_environment: Callable[..., None], caplog: pytest.LogCaptureFixture, limit: int
) -> None:
    set_environment(SKINK_REWRITE_LIMIT=str(limit))
    program = captured("llama").clone()
    Pipeline((Canonicalize(),)).run(program, verify=0)
    Pipeline((), start=program.stage).run(program, verify=0)
    said = [record.getMessage() for record in caplog.records if record.name == "skink.limit"]
    assert said == [
        f"SKINK_REWRITE_LIMIT={limit} stopped pass canonicalize: the program stays at stage captured, and no later "
        "pass runs."
    ]


def test_a_limit_that_is_not_reached_says_nothing(
    set_environment: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    set_environment(SKINK_REWRITE_LIMIT="100000")
    Pipeline((Canonicalize(),)).run(captured("llama").clone(), verify=0)
    assert not [record for record in caplog.records if record.name.startswith("skink")]


@dataclass(frozen=True)
class Learn(Pass):
    """Says what it was given to learn from, and sets the first weight to the original's times two."""

    name: ClassVar[str] = "learn"
    summary: ClassVar[str] = "for tests"
    requires: ClassVar[Stage] = Stage.CANONICAL
    exactness: ClassVar[Literal["exact", "approximate"]] = "approximate"

    teacher: bool = True

    @property
    def needs_original(self) -> bool:
        return self.teacher

    def training_tokens(self, length: int) -> int:
        return 10 * length

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        assert context.training is not None
        context.status("learning")
        original = context.original
        notes = (context.training.source, "none" if original is None else str(len(original.edits)))
        if original is not None:
            name, weight = next(iter(original.weights()))
            program.set_weight(name, 2 * weight.detach())
        return PassResult(edits=0, notes=notes, training={"steps": 1})


TEXT = Windows(torch.zeros(2, 8, dtype=torch.int64), "a text", "12")


def test_a_pass_that_trains_needs_text_before_anything_runs() -> None:
    program = captured("llama")
    with pytest.raises(RecoveryError, match=r"\[RECOVER-005\] pass learn trains, and no text to train on was given."):
        Pipeline((Canonicalize(), Learn())).run(program)
    assert program.stage is Stage.CAPTURED


def test_the_original_is_the_canonical_program_before_its_rewrites() -> None:
    program = captured("llama")
    first = next(iter(program.weights()))[1].detach().clone()
    said: list[str] = []
    pipeline = Pipeline((Canonicalize(), Learn(), Learn(teacher=False), Learn()))
    result = pipeline.run(program, verify=1, training=TEXT, status=said.append)
    canonicalized = str(len(program.edits))
    # The second of them learns from the same, not from what the first made.
    assert [record.result.notes for record in result.passes[1:]] == [("a text", canonicalized)] * 3
    assert torch.equal(next(iter(program.weights()))[1], 2 * first)
    assert said == ["learning"] * 3
    assert result.passes[1].result.training == {"steps": 1}


def test_nobody_gets_an_original_that_nobody_asks_for() -> None:
    program = canonical("llama")
    result = Pipeline((Learn(teacher=False),), start=program.stage).run(program, verify=1, training=TEXT)
    assert result.passes[0].result.notes == ("a text", "none")


def test_a_teacher_that_is_named_is_the_original() -> None:
    program, teacher = canonical("llama"), canonical("llama")
    name, weight = next(iter(teacher.weights()))
    teacher.set_weight(name, weight + 1)
    Pipeline((Learn(),), start=program.stage).run(program, verify=1, training=TEXT, original=teacher)
    assert torch.equal(program.weight(name), 2 * (weight + 1))


def test_a_pass_that_trains_does_not_run_behind_the_limit(set_environment: Callable[..., None]) -> None:
    set_environment(SKINK_REWRITE_LIMIT="3")
    program = captured("llama")
    result = Pipeline((Canonicalize(), Learn())).run(program, verify=1, training=TEXT)
    assert [record.pass_.name for record in result.passes] == ["canonicalize"]
