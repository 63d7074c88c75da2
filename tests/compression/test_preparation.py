"""What a compression begins with, and what is refused before that."""

from pathlib import Path

import pytest
import torch

from skink.compression import CompressOptions, TextOptions, TrainingTextOptions
from skink.compression.preparation import check_texts, prepare
from skink.errors import OutputError, RecoveryError, SkinkError
from skink.graph.program import Stage
from skink.passes.recipe import load_recipe
from tests.models import build

TOKENS = torch.randint(0, 97, (40, 16), generator=torch.Generator().manual_seed(0))


def silent(name: str, done: int, total: int) -> None:
    pass


def test_what_needs_text_is_refused_without() -> None:
    with pytest.raises(RecoveryError, match=r"\[RECOVER-005\]"):
        check_texts("a-model", load_recipe("recover"), CompressOptions())
    with pytest.raises(RecoveryError, match=r"\[RECOVER-005\]"):
        check_texts("a-model", load_recipe("recover"), CompressOptions(calibration=None, held_out="stdlib"))
    check_texts("stdlib-llama", load_recipe("recover"), CompressOptions())
    check_texts("a-model", load_recipe("recover"), CompressOptions(calibration="stdlib"))
    check_texts("a-model", load_recipe("low-rank{method=plain}"), CompressOptions())


def test_alternatives_that_train_count_too(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes: []\ncompare: [recover]\n")
    with pytest.raises(RecoveryError, match=r"\[RECOVER-005\]"):
        check_texts("a-model", load_recipe(recipe), CompressOptions())


def test_a_teacher_for_nobody_is_refused() -> None:
    with pytest.raises(RecoveryError, match=r"\[RECOVER-009\] a teacher was named, and no pass of the recipe learns"):
        check_texts("stdlib-llama", load_recipe("recover{ce=1}"), CompressOptions(teacher="stdlib-llama"))
    check_texts("stdlib-llama", load_recipe("recover{kl=1}"), CompressOptions(teacher="stdlib-llama"))


def test_text_to_judge_by_is_not_trained_on() -> None:
    for given in ({"training": ["a.txt", "b.txt"]}, {"calibration": "b.txt"}):
        options = CompressOptions(held_out=["b.txt"], **given)
        with pytest.raises(
            RecoveryError, match=r"\[RECOVER-002\] 'b.txt' is text to train on and held-out text in one"
        ):
            check_texts("a-model", load_recipe("recover"), options)
    same = CompressOptions(calibration="b.txt", held_out="b.txt")
    check_texts("a-model", load_recipe("low-rank{method=plain}"), same)
    check_texts("a-model", load_recipe("recover"), CompressOptions(training="stdlib", held_out="stdlib"))


def test_a_place_where_no_checkpoints_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="file is a file"):
            check_texts("stdlib-llama", load_recipe("recover"), CompressOptions(checkpoints=folder))
    check_texts("stdlib-llama", load_recipe("recover"), CompressOptions(checkpoints=tmp_path / "new" / "folder"))
    check_texts("stdlib-llama", load_recipe("recover"), CompressOptions(checkpoints=Path("new")))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_model_text_and_teacher_are_read(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "student")
    build("llama", num_hidden_layers=3).save_pretrained(tmp_path / "teacher")
    options = CompressOptions(
        training=TOKENS, teacher=str(tmp_path / "teacher"), texts=TextOptions(held_out_windows=2, length=16)
    )
    found = prepare(str(tmp_path / "student"), load_recipe("recover{kl=1,tokens=160}"), options, silent)
    assert found.tokenizer is None
    assert not found.encoder
    assert found.teacher.stage is Stage.CANONICAL
    assert any("layers.2." in name for name, _ in found.teacher.weights())
    assert found.texts.training.tokens.numel() >= 160
    assert found.texts.held_out is not None


def test_text_that_is_not_there_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "tokens.bin").write_bytes(b"12")
    for name, code in (("none.txt", "INPUT-001"), ("none.npy", "INPUT-001"), ("tokens.bin", "RECOVER-008")):
        with pytest.raises(SkinkError, match=rf"\[{code}\]"):
            check_texts("a-model", load_recipe("recover"), CompressOptions(training=[str(tmp_path / name)]))
    known = CompressOptions(training=str(tmp_path / "tokens.bin"), training_texts=TrainingTextOptions(dtype="uint16"))
    check_texts("a-model", load_recipe("recover"), known)


@pytest.mark.parametrize(
    "options",
    [{"training": "stdlib"}, {"training_texts": TrainingTextOptions(length=8)}, {"checkpoints": Path("kept")}],
)
def test_what_is_said_of_training_is_refused_where_nothing_trains(options: dict[str, object], tmp_path: Path) -> None:
    for text in ("low-rank", ""):
        with pytest.raises(RecoveryError, match=r"\[RECOVER-009\]"):
            check_texts("stdlib-llama", load_recipe(text), CompressOptions(**options))  # type: ignore[arg-type]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes: [low-rank]\ncompare: [recover]\n")
    check_texts("stdlib-llama", load_recipe(recipe), CompressOptions(**options))  # type: ignore[arg-type]
