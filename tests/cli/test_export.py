from pathlib import Path

from tests.cli.conftest import Run


def test_a_skink_folder_becomes_a_checked_onnx_folder(run: Run, compressed: Path, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    done = run("export", compressed, "--onnx", out, "--json")
    assert done.code == 0, done.stderr
    assert done.json["folder"] == str(out)
    assert done.json["check"] is not None
    assert {"model.onnx", "model.onnx.data", "tokenizer.json", "config.json"} <= {path.name for path in out.iterdir()}
    generated = [run("generate", model, "def", "--max-new-tokens", 8, "--json") for model in (compressed, out)]
    assert generated[0].json["continuation"] == generated[1].json["continuation"]


def test_any_model_can_be_exported_as_it_is(run: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    done = run("export", tiny, "--onnx", out, "--no-check")
    assert done.code == 0, done.stderr
    assert "opset" in done.stdout
    assert (out / "model.onnx").is_file()


def test_an_existing_folder_is_refused_before_any_work(run: Run, tmp_path: Path) -> None:
    done = run("export", "no-such-model", "--onnx", tmp_path, "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == "OUTPUT-001"


def test_an_onnx_folder_cannot_be_exported_again(run: Run, compressed: Path, tmp_path: Path) -> None:
    done = run("export", compressed / "onnx", "--onnx", tmp_path / "again", "--json")
    assert done.json["error"]["code"] == "MODEL-001"
    assert str(compressed) in done.json["error"]["fix"]
