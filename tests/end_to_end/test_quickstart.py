"""The main job on the model that ships, with fewer windows than `make quickstart` uses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from skink.export.report import Report

ROOT = Path(__file__).parents[2]
PROMPT = "def main():"
TOKENS = 24
LOAD = """
import json, sys
import skink
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
logging.set_verbosity_error()
folder, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(prompt, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0, inputs["input_ids"].shape[1]:]
parameters = sum(parameter.numel() for parameter in model.parameters())
print(json.dumps({"class": type(model).__name__, "ids": ids.tolist(), "text": tokenizer.decode(ids),
                  "parameters": parameters}))
"""


def _process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )


def _json(*arguments: str) -> Any:
    done = _process(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the quick start writes."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    done = _process(
        *("-m", "skink", "compress", "stdlib-llama", "--recipe", "quickstart", "--out", str(out), "--onnx"),
        *("--calibration-windows", "16", "--held-out-windows", "8", "--length", "128"),
        *("--rounds", "1", "--prompt-tokens", "32", "--new-tokens", "8"),
    )
    assert done.returncode == 0, done.stderr
    for part in ("Perplexity", "Decode, tok/s", "low-rank{keep=0.8,method=plain}", "skink generate"):
        assert part in done.stdout
    return out


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return Report.from_json((folder / "report.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_table_has_numbers_before_and_after(report: Report) -> None:
    source, dense, small, runtime = report.forms
    assert small.parameters < 0.85 * source.parameters
    assert small.linear_parameters < 0.81 * source.linear_parameters
    for form in (source, dense, small):
        assert form.perplexity is not None
        assert form.speed is not None
    assert runtime.speed is not None
    # An empty recipe changes nothing; the recipe costs something, but not much.
    assert abs(dense.perplexity.nats - source.perplexity.nats) < 1e-5
    assert 0.0 < small.perplexity.nats - source.perplexity.nats < 0.1


@pytest.mark.slow
def test_the_weights_on_disk_are_smaller_than_the_source_s(folder: Path) -> None:
    source = ROOT / "skink" / "assets" / "stdlib-llama" / "model.safetensors"
    assert (folder / "model.safetensors").stat().st_size < 0.85 * source.stat().st_size


@pytest.mark.slow
def test_the_recipe_beats_plain(report: Report) -> None:
    recipe, plain = report.comparisons
    assert plain.name == "low-rank{keep=0.8,method=plain}"
    # Uniform ranks are rounded down, each by itself.
    assert 0.0 <= recipe.keep - plain.keep < 0.005
    assert recipe.ratio_to_dense - 1.0 < 0.2 * (plain.ratio_to_dense - 1.0)


@pytest.mark.slow
def test_the_folder_loads_in_a_fresh_process_and_the_onnx_folder_agrees(folder: Path, report: Report) -> None:
    loaded = _json("-c", LOAD, str(folder), PROMPT, str(TOKENS))
    assert loaded["class"] == "SkinkForCausalLM"
    assert loaded["parameters"] == report.forms[2].parameters
    assert len(set(loaded["ids"])) > 2
    onnx = _json(*("-m", "skink", "generate", str(folder / "onnx"), PROMPT, "--max-new-tokens", str(TOKENS), "--json"))
    assert onnx["continuation"] == loaded["text"]
