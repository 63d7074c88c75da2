"""The main job on disk: what the folder holds, and that a failure leaves none."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open

import skink
from skink.compression import CompressOptions, SpeedOptions, TextOptions, compress_to_folder
from skink.errors import RecipeError, SkinkError
from skink.evaluation import Documents
from skink.export.huggingface.loading import load_source
from skink.export.report import read_report
from skink.graph.program import Stage
from tests.sample_pass import Sample

TEXT = Documents("numbers", (" ".join(str(number) for number in range(3000)),))
QUICK = CompressOptions(
    calibration=TEXT,
    texts=TextOptions(calibration_windows=4, held_out_windows=2, length=32),
    speed=SpeedOptions(prompt=4, new_tokens=2, rounds=1),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of the model that ships, stored in half precision with its tokenizer."""
    model, tokenizer = load_source("stdlib-llama")
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    folder = tmp_path_factory.mktemp("source") / "two-layers"
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def result(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text("passes: [low-rank: {keep: 0.5}]\ncompare: ['low-rank{keep=0.5,method=plain}']\n")
    out = tmp_path_factory.mktemp("out") / "smaller"
    compress_to_folder(str(checkpoint), recipe, out, QUICK)
    return out


def test_weights_are_stored_as_the_source_stored_them(result: Path) -> None:
    with safe_open(result / "model.safetensors", "pt") as weights:
        assert weights.get_slice("model.layers.0.mlp.up_proj.down.weight").get_dtype() == "F16"
        assert weights.get_slice("model.rotary_emb.inv_freq").get_dtype() == "F32"


def test_the_report_stands_beside_them(result: Path) -> None:
    report = read_report(result)
    assert [form.name for form in report.forms] == ["transformers", "skink, empty recipe", "skink, compressed"]
    assert all(form.perplexity is not None and form.speed is not None for form in report.forms)
    first, second = report.comparisons
    assert first.name == "this recipe: low-rank{keep=0.5,method=whitened}"
    assert second.name == "low-rank{keep=0.5,method=plain}"
    assert first.keep == pytest.approx(second.keep)
    assert (result / "recipe.yaml").read_text().startswith("passes:")


def test_the_card_has_the_folders_name(result: Path) -> None:
    assert (result / "README.md").read_text().splitlines()[5] == "# smaller"


def test_the_folder_loads_and_scores_as_reported(result: Path) -> None:
    model = skink.load(result)
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == read_report(result).forms[-1].parameters


def test_nothing_is_measured_when_that_is_not_wanted(checkpoint: Path, tmp_path: Path) -> None:
    options = CompressOptions(calibration=TEXT, texts=QUICK.texts, evaluate=False)
    report = compress_to_folder(str(checkpoint), "low-rank{keep=0.5}", tmp_path / "out", options)
    assert all(form.perplexity is None and form.speed is None for form in report.forms)
    assert report.comparisons == []


def test_a_failure_leaves_no_folder(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SkinkError, match=r"\[CALIBRATION-002\]"):
        compress_to_folder(str(checkpoint), "low-rank", tmp_path / "out", CompressOptions())
    with pytest.raises(SkinkError, match=r"\[RECIPE-001\]"):
        compress_to_folder(str(checkpoint), "low-rnak", tmp_path / "out", QUICK)
    assert list(tmp_path.iterdir()) == []


def test_text_that_no_one_calibrates_on_is_not_needed(checkpoint: Path, tmp_path: Path) -> None:
    report = compress_to_folder(str(checkpoint), [], tmp_path / "out", CompressOptions(speed=QUICK.speed))
    assert report.notes == ["No held-out text was given: perplexity was not measured."]
    assert report.forms[0].perplexity is None


class AfterLowering(Sample):
    """Wants a stage that no recipe leaves."""

    name: ClassVar[str] = "after-lowering"
    requires: ClassVar[Stage] = Stage.LOWERED


def test_an_order_of_passes_that_cannot_be_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"\[RECIPE-003\] pass after-lowering needs stage lowered"):
        compress_to_folder("no-such-model", [AfterLowering()], tmp_path / "out")
