"""What bad input gets: an error with a code and a way out, a non-zero exit, and nothing half-written."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.cli.conftest import Run

LOW_RANK = "low-rank{keep=0.5,method=plain}"


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """An output folder that must not be there after the test, nor anything beside it."""
    parent = tmp_path / "outputs"
    parent.mkdir()
    yield parent / "out"
    assert list(parent.iterdir()) == []


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "copied"))


def refused(run: Run, model: object, out: Path, *more: object, recipe: str = LOW_RANK) -> dict[str, Any]:
    """The error of `skink compress`, after checking that it is said in both forms."""
    arguments = ("compress", model, "--recipe", recipe, "--out", out, "--no-evaluate", *more)
    done = run(*arguments, "--json")
    assert done.code == 1, done.stderr
    error: dict[str, Any] = done.json["error"]
    assert f"[{error['code']}] {error['what']}" in done.stderr
    assert f"docs/errors.md#{error['code'].lower()}" in done.stderr
    return error


def test_a_folder_that_is_no_checkpoint(run: Run, tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "todo.txt").write_text("milk")
    error = refused(run, folder, out)
    assert error["code"] == "MODEL-001"
    assert "config.json is missing" in error["what"]
    assert "todo.txt" in error["why"]


def test_a_file_instead_of_a_folder(run: Run, copied: Path, out: Path) -> None:
    assert refused(run, copied / "config.json", out)["code"] == "MODEL-001"


def test_a_truncated_weights_file(run: Run, copied: Path, out: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    error = refused(run, copied, out)
    assert error["code"] == "MODEL-002"
    assert "model.safetensors" in error["what"] + error["where"]


def test_a_corrupted_weights_file(run: Run, copied: Path, out: Path) -> None:
    path = copied / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"\x00" * 32
    path.write_bytes(content)
    assert refused(run, copied, out)["code"] == "MODEL-002"


def test_weights_that_are_pickles(run: Run, copied: Path, out: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    assert refused(run, copied, out)["code"] == "MODEL-003"


def test_an_unknown_pass(run: Run, tiny: Path, out: Path) -> None:
    error = refused(run, tiny, out, recipe="low-rnk{keep=0.5}")
    assert error["code"] == "RECIPE-001"
    assert "did you mean 'low-rank'?" in error["fix"]
    assert "canonicalize" in error["fix"]


def test_an_unknown_option(run: Run, tiny: Path, out: Path) -> None:
    error = refused(run, tiny, out, recipe="low-rank{kep=0.5}")
    assert error["code"] == "OPTION-001"
    assert "did you mean 'keep'?" in error["fix"]
    assert "method" in error["fix"]


def test_an_unknown_option_by_set(run: Run, tiny: Path, out: Path) -> None:
    assert refused(run, tiny, out, "--set", "low-rank.kep=0.5")["code"] == "OPTION-001"
    assert refused(run, tiny, out, "--set", "lowrank.keep=0.5")["code"] == "OPTION-001"


def test_an_option_of_the_wrong_type(run: Run, tiny: Path, out: Path) -> None:
    assert refused(run, tiny, out, recipe="low-rank{keep=much}")["code"] == "OPTION-003"


def test_a_recipe_that_is_not_yaml(run: Run, tiny: Path, out: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_text("passes: [low-rank: {")
    assert refused(run, tiny, out, recipe=str(recipe))["code"] == "RECIPE-002"


@pytest.mark.parametrize("keep", ["0", "1.5", "-1"])
def test_a_keep_ratio_out_of_range(run: Run, tiny: Path, out: Path, keep: str) -> None:
    error = refused(run, tiny, out, "--set", f"low-rank.keep={keep}")
    assert error["code"] == "OPTION-002"
    assert "(0, 1]" in error["what"]


def test_empty_calibration_text(run: Run, tiny: Path, out: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("  \n")
    error = refused(run, tiny, out, "--calibration", empty, recipe="low-rank")
    assert error["code"] == "CALIBRATION-001"
    assert "empty.txt" in error["what"]


def test_calibration_text_that_is_not_there(run: Run, tiny: Path, out: Path, tmp_path: Path) -> None:
    assert refused(run, tiny, out, "--calibration", tmp_path / "no.txt", recipe="low-rank")["code"] == "INPUT-001"


def test_no_calibration_text_where_it_is_needed(run: Run, tiny: Path, out: Path) -> None:
    assert refused(run, tiny, out, recipe="low-rank")["code"] == "CALIBRATION-002"


def test_a_capture_that_fails_names_the_line(run: Run, tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the line to be named
            return x
        return -x

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    error = refused(run, tiny, out)
    assert error["code"] == "CAPTURE-002"
    assert "test_bad_input.py" in error["where"]
    assert "if x.sum() > 0:" in error["where"]
    assert "torch.where" in error["fix"]


def test_no_space_left(run: Run, tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    found = refused(run, tiny, out, "--verify", 0, recipe="")
    assert found["code"] == "OUTPUT-002"
    assert "no space left" in found["what"]


def test_an_output_folder_that_cannot_be_made(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refused(run, tiny, tmp_path / "file" / "out")["code"] == "OUTPUT-002"


def test_a_model_without_tokenizer_cannot_read_text(run: Run, copied: Path, out: Path, text: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    error = refused(run, copied, out, "--calibration", text, recipe="low-rank")
    assert error["code"] in ("MODEL-001", "CALIBRATION-002")
    assert "tokenizer" in error["what"]


def test_a_damaged_graph(run: Run, compressed: Path, tmp_path: Path, out: Path) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "damaged"))
    graph = json.loads((folder / "graph.json").read_text())
    del graph["program"]
    (folder / "graph.json").write_text(json.dumps(graph))
    assert refused(run, folder, out)["code"] == "GRAPH-001"
