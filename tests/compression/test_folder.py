"""The main job on disk: what the folder holds, and that a failure leaves none."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast

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
    recipe.write_text(
        "passes: [low-rank: {keep: 0.5, method: whitened}]\ncompare: ['low-rank{keep=0.5,method=plain}']\n"
    )
    out = tmp_path_factory.mktemp("out") / "smaller"
    compress_to_folder(str(checkpoint), recipe, out, replace(QUICK, measure_layers=True))
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


def test_what_was_saved_is_in_the_report_and_on_the_card(result: Path) -> None:
    savings = {each.unit: each for each in read_report(result).savings}
    assert list(savings) == ["params", "bytes", "flops", "latency"]
    assert all(each.linear is not None and each.model is not None for each in savings.values())
    # Stored in half precision.
    assert savings["bytes"].linear.after.value == 2 * savings["params"].linear.after.value
    assert "| Latency | " in (result / "README.md").read_text()


def test_each_factored_layer_is_measured_alone(result: Path) -> None:
    layers = read_report(result).layers
    factored = [layer.decision == "factored" for layer in layers]
    assert any(factored)
    assert [layer.measured_loss is not None for layer in layers] == factored


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


def encoder_folder(folder: Path, kind: type[BertModel]) -> Path:
    """A tiny encoder with a tokenizer of whole words, as sentence-transformers stores one."""
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2} | {str(number): number + 3 for number in range(200)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    config = BertConfig(
        vocab_size=203, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    kind(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    kinds = "sentence_transformers.models"
    (folder / "modules.json").write_text(
        f'[{{"path": "", "type": "{kinds}.Transformer"}}, {{"path": "1_Pooling", "type": "{kinds}.Pooling"}}]'
    )
    return folder


SENTENCES = Documents(
    "numbers", ("\n\n".join(" ".join(str((7 * i + j * j) % 200) for j in range(8)) for i in range(80)),)
)


@pytest.mark.parametrize(
    ("kind", "measures"),
    [
        (BertModel, {"Cosine to source", "Cosine, 5th percentile", "Recall@1", "Recall@10", "MRR"}),
        (BertForMaskedLM, {"Same first choice", "Divergence, nats"}),
    ],
    ids=["none", "head"],
)
def test_an_encoder_is_measured_by_what_it_gives(tmp_path: Path, kind: type[BertModel], measures: set[str]) -> None:
    source = encoder_folder(tmp_path / "source", kind)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "passes: [low-rank: {keep: 0.5, method: whitened}]\ncompare: ['low-rank{keep=0.5,method=plain}']\n"
    )
    options = CompressOptions(calibration=SENTENCES, texts=QUICK.texts, measure_layers=True)
    report = compress_to_folder(str(source), recipe, tmp_path / "small", options)
    unit = "nats per token" if kind is BertForMaskedLM else "of the results' squared norm"
    assert report.loss_unit == unit
    assert all((layer.measured_loss is not None) == (layer.rank is not None) for layer in report.layers)
    assert sum(layer.measured_loss or 0.0 for layer in report.layers) > 0
    names = [form.name for form in report.forms]
    assert names == ["transformers", "skink, empty recipe", "skink, compressed", "low-rank{keep=0.5,method=plain}"]
    assert all(form.perplexity is None and form.speed is None for form in report.forms)
    for form in report.forms[1:]:
        assert measures <= {entry.name for entry in form.quality}
        if kind is BertModel:
            assert {entry.settings["pooling"] for entry in form.quality} == {"cls"}
    assert report.comparisons == []
    assert report.forms[2].linear_parameters < 0.6 * report.forms[0].linear_parameters
    assert any("Speed was not measured" in note for note in report.notes)
    assert (tmp_path / "small" / "1_Pooling" / "config.json").is_file()
    assert type(skink.load(tmp_path / "small")).__name__.removeprefix("Skink") == kind.__name__.removeprefix("Bert")


def test_an_encoder_without_text_is_compressed_and_not_measured(tmp_path: Path) -> None:
    source = encoder_folder(tmp_path / "source", BertModel)
    report = compress_to_folder(str(source), "low-rank{method=plain}", tmp_path / "small", CompressOptions())
    assert report.notes[0] == "No held-out text was given: quality was not measured."
    assert all(form.quality == [] for form in report.forms)


@pytest.mark.parametrize("loss", ["hidden=1,learning_rate=1e-5", "by=layer,train=new,learning_rate=3e-3"])
def test_an_encoder_learns_from_what_it_was(tmp_path: Path, loss: str) -> None:
    source = encoder_folder(tmp_path / "source", BertModel)
    recipe = f"low-rank{{keep=0.5,method=plain}}, recover{{{loss},steps=20,batch=8}}"
    options = CompressOptions(calibration=SENTENCES, texts=QUICK.texts)
    report = compress_to_folder(str(source), recipe, tmp_path / "small", options)
    [recovery] = report.recoveries
    assert recovery.losses[-1][1] < recovery.losses[0][1]
    assert recovery.before is None or recovery.after < recovery.before
    assert (tmp_path / "small" / "model.safetensors").is_file()
