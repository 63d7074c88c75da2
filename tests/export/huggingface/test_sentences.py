"""What is read of sentence-transformers' files, and what is copied."""

import json
from pathlib import Path
from typing import Any

import pytest

from skink.errors import ModelError
from skink.evaluation.embeddings import Pooling
from skink.export.huggingface.sentences import SentenceSettings, copy_sentence_files, sentence_settings

KIND = "sentence_transformers.models"


def folder(path: Path, pooling: dict[str, Any], *, normalise: bool = True, where: str = "") -> Path:
    """A folder as sentence-transformers writes it, without the model."""
    modules = [{"path": where, "type": f"{KIND}.Transformer"}, {"path": "1_Pooling", "type": f"{KIND}.Pooling"}]
    if normalise:
        modules.append({"path": "2_Normalize", "type": f"{KIND}.Normalize"})
    (path / "1_Pooling").mkdir(parents=True)
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 256}')
    (path / "pytorch_model.bin").write_text("a pickle")
    return path


@pytest.mark.parametrize(
    ("pooling", "normalise", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, True, Pooling("mean", True)),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, False, Pooling("cls", False)),
        ({"pooling_mode_max_tokens": True}, True, Pooling("max", True)),
        ({"pooling_mode": "cls"}, True, Pooling("cls", True)),
        ({}, True, Pooling("mean", True)),
    ],
)
def test_settings(tmp_path: Path, pooling: dict[str, Any], normalise: bool, expected: Pooling) -> None:
    found = sentence_settings(folder(tmp_path / "model", pooling, normalise=normalise))
    assert found == SentenceSettings(expected, 256)


def test_a_folder_without_them_has_the_defaults(tmp_path: Path) -> None:
    assert sentence_settings(tmp_path) == SentenceSettings(Pooling("mean", True), None)
    assert copy_sentence_files(tmp_path, tmp_path / "out") == ()
    assert not (tmp_path / "out").exists()


def test_what_is_needed_is_copied_and_no_more(tmp_path: Path) -> None:
    names = copy_sentence_files(folder(tmp_path / "model", {}), tmp_path / "out")
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == set(names) == {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}


def test_a_model_in_a_folder_of_its_own_is_not_taken_for_ours(tmp_path: Path) -> None:
    assert copy_sentence_files(folder(tmp_path / "model", {}, where="0_Transformer"), tmp_path / "out") == ()


@pytest.mark.parametrize("text", ["{", '{"a": 1}', '[{"path": "../secret", "type": "x"}]', '[{"path": 3}]', "[7]"])
def test_damaged_lists_and_paths_that_lead_outside_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(ModelError, match=r"\[MODEL-001\] modules.json"):
        copy_sentence_files(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_whose_weights_are_a_pickle_is_refused(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", {})
    modules = json.loads((model / "modules.json").read_text())
    (model / "modules.json").write_text(json.dumps([*modules, {"path": "3_Dense", "type": f"{KIND}.Dense"}]))
    (model / "3_Dense").mkdir()
    (model / "3_Dense" / "config.json").write_text("{}")
    (model / "3_Dense" / "pytorch_model.bin").write_text("a pickle")
    with pytest.raises(ModelError, match=r"\[MODEL-003\].*3_Dense in a pickle"):
        copy_sentence_files(model, tmp_path / "out")
    (model / "3_Dense" / "model.safetensors").write_text("weights")
    assert "3_Dense/model.safetensors" in copy_sentence_files(model, tmp_path / "out")
