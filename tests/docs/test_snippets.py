"""The Python of the pages that users copy from runs, in order, on the model that ships."""

import shutil
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import skink.compression
from skink.compression import CompressOptions, TextOptions, compress_to_folder
from skink.export.huggingface.loading import load_source
from skink.passes.recipe import load_recipe
from tests.docs.pages import Page, page

PAGES = tuple(
    map(
        page,
        (
            "README.md",
            "docs/onnx.md",
            "docs/report.md",
            "docs/building.md",
            "docs/recover.md",
            "docs/training_text.md",
            "docs/your_own_training_loop.md",
        ),
    )
)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make quickstart` leaves, less its measurements."""
    folder = tmp_path_factory.mktemp("snippets") / "compressed"
    # With little text: what is shown here is that the pages' code runs.
    options = CompressOptions(evaluate=False, verify=0, texts=TextOptions(calibration_windows=4, length=64))
    compress_to_folder("stdlib-llama", load_recipe("quickstart"), folder, options)
    return folder


def _shallow(name: str, **options: Any) -> tuple[Any, Any]:
    """A model to work on with two of its layers, whose names and shapes are those of all."""
    model, tokenizer = load_source(name, **options)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model, tokenizer


@pytest.mark.slow
# PEFT asks transformers by a name that transformers has replaced.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("entry", PAGES, ids=lambda entry: entry.path)
def test_python_runs(
    entry: Page,
    compressed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("build/quickstart", "smaller"):
        shutil.copytree(compressed, tmp_path / name)
    # The package's `compress` is the function, not the module.
    for module in (skink.compression, import_module("skink.compression.compress")):
        monkeypatch.setattr(module, "TextOptions", partial(TextOptions, calibration_windows=4, length=64))
    monkeypatch.setattr("skink.export.huggingface.loading.load_source", _shallow)
    namespace: dict[str, object] = {"__name__": "snippets"}
    with torch.random.fork_rng():
        for block in entry.blocks():
            if block.language == "python":
                exec(compile(block.text, f"<{entry.path}, {block.heading}>", "exec"), namespace)
    printed = capsys.readouterr().out
    for expected in _PRINTED[entry.path]:
        assert expected in printed
    for file in _WRITTEN.get(entry.path, ()):
        assert (tmp_path / file).is_file()


_PRINTED = {
    "README.md": (
        "model.layers.0.self_attn.q_proj (256, 256) factored 1",
        "program rewritten(%input_ids: i64[B,T]",
        "def main():",
    ),
    "docs/onnx.md": ("'Attention': 8", "def main():"),
    "docs/report.md": ("transformers 6951168", "skink, compressed 57"),
    "docs/building.md": ("(",),
    "docs/recover.md": ("held-out loss",),
    "docs/training_text.md": ("torch.Size([79, 256])", "[8, 4]", "torch.Size([100, 32])", "[RECOVER-002]"),
    "docs/your_own_training_loop.md": (
        "torch.Size([8, 64])",
        "divergence from the original",
        "SkinkForCausalLM",
        "weights were merged",
        "attention: torch",
    ),
}
_WRITTEN = {
    "README.md": ("trained/model.safetensors", "smaller-onnx/model.onnx", "smaller-onnx/tokenizer.json"),
    "docs/your_own_training_loop.md": (
        "distilled/graph.json",
        "runs/checkpoint-2/optimizer.pt",
        "adapter/adapter_model.safetensors",
        "merged/graph.json",
    ),
}


def test_the_readme_shows_how_to_compress_load_print_train_and_export() -> None:
    text = "".join(block.text for block in page("README.md").blocks() if block.language == "python")
    for name in ("skink.compress(", "skink.load(", "generate(", "get_peft_model(", "export_onnx(", "print("):
        assert name in text


def test_the_table_of_the_quick_start_has_the_forms_and_the_methods_that_it_prints() -> None:
    from skink.compression.measure import DENSE, RESULT, RUNTIME, SOURCE

    table = next(block.text for block in page("README.md").blocks() if "Perplexity" in block.text)
    # Headings of two words may stand on two lines, above the rule.
    header = table.split("─")[0].split()
    for form in (SOURCE, DENSE, RESULT, RUNTIME):
        assert set(form.split()) <= set(header), form
    assert load_recipe("quickstart").compare[0] in table
