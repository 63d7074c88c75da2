"""The main job in memory: what comes out generates, and the caller's model is left alone."""

import hashlib

import pytest
import torch
from torch import nn

import skink
from skink.compression import compress, compress_program
from skink.errors import SkinkError
from skink.evaluation import Documents
from skink.export.huggingface.loading import load_source
from tests.models import VOCABULARY, build, tiny


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(name.encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def _windows(count: int = 4, length: int = 24) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def test_an_empty_recipe_gives_the_same_model_back() -> None:
    model = tiny("llama")
    result = skink.compress(model, recipe=[])
    ids = _windows(2, 9)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.allclose(result(input_ids=ids).logits, expected, atol=1e-5)
    assert result.compression.result.layers == ()
    assert sum(p.numel() for p in result.parameters()) == sum(p.numel() for p in model.parameters())


def test_the_callers_model_is_unchanged_and_shares_nothing() -> None:
    model = build("llama")
    before, attention = _digest(model), model.config._attn_implementation
    model.train()
    result = compress(model, "low-rank{keep=0.5}", calibration=_windows())
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.zero_()
    assert _digest(model) == before
    assert model.training
    assert model.config._attn_implementation == attention


def test_low_rank_makes_it_smaller_and_says_what_it_did() -> None:
    result = compress(tiny("llama"), "low-rank", calibration=_windows(), overrides={"low-rank.keep": 0.5})
    done = result.compression
    factored = [layer for layer in done.result.layers if layer.decision == "factored"]
    assert factored
    saved = sum(layer.parameters_before - layer.parameters_after for layer in done.result.layers)
    dense = sum(p.numel() for p in tiny("llama").parameters())
    assert sum(p.numel() for p in result.parameters()) == dense - saved
    assert done.result.passes[-1].numbers is not None
    assert str(done.recipe) == "low-rank{keep=0.5}"


def test_the_dense_program_keeps_the_source_weights() -> None:
    done = compress_program(tiny("gpt2"), "low-rank{keep=0.5,method=plain}")
    names = {name for name, _ in done.dense.weights()}
    assert "transformer.h.0.mlp.c_fc.weight" in names
    assert "transformer.h.0.mlp.c_fc.down.weight" in {name for name, _ in done.program.weights()}


def test_a_recipe_that_needs_calibration_says_so_before_any_work() -> None:
    with pytest.raises(SkinkError, match=r"\[CALIBRATION-002\] the recipe 'low-rank' needs calibration text"):
        compress(tiny("llama"), "low-rank")


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(SkinkError, match=r"\[CALIBRATION-002\]"):
        compress(tiny("llama"), "low-rank", calibration="stdlib")


def test_a_name_loads_model_and_tokenizer(tmp_path: object) -> None:
    model = tiny("llama")
    model.save_pretrained(str(tmp_path))
    result = compress(str(tmp_path), [])
    assert result.config.source["model_type"] == "llama"


def test_the_model_that_ships_is_not_asked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"asked the hub for {arguments}")

    for module in ("checkpoint", "loading", "sentences"):
        monkeypatch.setattr(f"skink.export.huggingface.{module}.cached_file", refuse)
    assert compress("stdlib-llama", []).config.source["model_type"] == "llama"


def test_progress_names_every_pass() -> None:
    seen: list[str] = []
    compress(
        tiny("llama"),
        "low-rank{keep=0.5}",
        calibration=_windows(),
        progress=lambda name, done, total: seen.append(name),
    )
    assert list(dict.fromkeys(seen)) == ["capture", "canonicalize", "low-rank"]


def test_calibration_text_is_read_with_the_tokenizer_given() -> None:
    model, tokenizer = load_source("stdlib-llama")
    text = Documents("numbers", (" ".join(str(number) for number in range(5000)),))
    recipe = "low-rank{keep=0.5,targets=[*layers.0.mlp.up_proj]}"
    result = compress(model, recipe, calibration=text, tokenizer=tokenizer)
    (layer,) = [layer for layer in result.compression.result.layers if layer.decision == "factored"]
    assert layer.name == "model.layers.0.mlp.up_proj"
