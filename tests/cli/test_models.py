from pathlib import Path

import pytest
from transformers import BertConfig, BertForMaskedLM, BertModel

from skink.cli.models import _place, captured_program, is_onnx, load_model, load_target
from skink.errors import ModelError
from skink.evaluation import HuggingFaceTarget
from skink.export.onnx import OrtRunner
from tests.cli.conftest import Run


def test_a_folder_with_a_graph_for_onnx_runtime_is_told_from_others(compressed: Path) -> None:
    assert is_onnx(str(compressed / "onnx"))
    assert not is_onnx(str(compressed))
    assert isinstance(load_target(str(compressed / "onnx")), OrtRunner)
    assert isinstance(load_target(str(compressed)), HuggingFaceTarget)


def test_where_pytorch_is_needed_the_folder_above_is_suggested(compressed: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(str(compressed / "onnx"))
    assert caught.value.code == "MODEL-001"
    assert str(compressed) in caught.value.fix


@pytest.mark.parametrize("meta", [True, False])
def test_an_encoder_is_refused(tmp_path: Path, meta: bool) -> None:
    class Unknown(BertConfig):
        model_type = "vit"

    Unknown().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not a causal language model"):
        captured_program(str(tmp_path), meta=meta)


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize(
    ("cls", "outputs"),
    [(BertModel, ("last_hidden_state", "pooler_output")), (BertForMaskedLM, ("logits",))],
    ids=["none", "head"],
)
def test_an_encoder_is_captured_as_what_it_was_saved_from(
    tmp_path: Path, cls: type[BertModel], outputs: tuple[str, ...], meta: bool
) -> None:
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    cls(BertConfig(**sizes, num_hidden_layers=1)).save_pretrained(tmp_path)
    program = captured_program(str(tmp_path), meta=meta)
    assert program.is_meta is meta
    assert program.outputs == outputs
    assert [entry.name for entry in program.inputs] == ["input_ids", "attention_mask", "token_type_ids"]


def test_the_model_that_ships_has_a_name() -> None:
    assert (Path(_place("stdlib-llama")) / "config.json").is_file()
    assert _place("some/folder") == "some/folder"


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM])
@pytest.mark.parametrize(
    "command",
    [
        ("generate", "def"),
        ("eval",),
        ("bench",),
        ("bisect", "--recipe", "low-rank{method=plain}"),
    ],
    ids=" ".join,
)
def test_commands_that_need_a_decoder_refuse_an_encoder(
    run: Run, tmp_path: Path, cls: type[BertModel], command: tuple[str, ...]
) -> None:
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    cls(BertConfig(**sizes, num_hidden_layers=1)).save_pretrained(tmp_path / "bert")
    name, *options = (entry.replace("OUT", str(tmp_path / "out")) for entry in command)
    done = run(name, tmp_path / "bert", *options)
    assert done.code == 1
    assert "[MODEL-005]" in done.stderr
    assert f"is an encoder ({cls.__name__})" in done.stderr
    assert "skink inspect" in done.stderr


def test_a_dry_run_says_what_would_be_measured_of_an_encoder(run: Run, tmp_path: Path) -> None:
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, num_hidden_layers=1)).save_pretrained(tmp_path / "bert")
    done = run(
        "compress", tmp_path / "bert", "--recipe", "low-rank{method=plain}", "--out", tmp_path / "o", "--dry-run"
    )
    assert done.code == 0, done.stderr
    assert "embeddings or scores, before and after" in done.stdout
    assert not (tmp_path / "o").exists()
