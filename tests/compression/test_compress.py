"""The main job in memory: what comes out generates, and the caller's model is left alone."""

import hashlib

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import skink
from skink.compression import TrainingTextOptions, compress, compress_program
from skink.errors import SkinkError
from skink.evaluation import Documents
from skink.export.huggingface.loading import load_source
from skink.graph.windows import Windows
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
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    text = Documents("numbers", (" ".join(str(number) for number in range(5000)),))
    recipe = "low-rank{keep=0.5,method=whitened,targets=[*layers.0.mlp.up_proj]}"
    result = compress(model, recipe, calibration=text, tokenizer=tokenizer, verify=0)
    (layer,) = [layer for layer in result.compression.result.layers if layer.decision == "factored"]
    assert layer.name == "model.layers.0.mlp.up_proj"


def _rows(count: int, seed: int) -> torch.Tensor:
    """Rows that go on by one."""
    first = torch.randint(0, VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(seed))
    return (first + torch.arange(16)) % VOCABULARY


def test_what_was_lost_is_won_back() -> None:
    held_out, recipe = _rows(6, 1), "low-rank{keep=0.5,method=plain}, recover{steps=30,learning_rate=0.003}"
    model = tiny("llama")
    before = _digest(model)
    result = compress(model, recipe, training=_rows(60, 2), held_out=held_out)
    cut = compress(model, recipe.partition(", recover")[0])
    training = result.compression.result.passes[-1].result.training
    assert training is not None
    with torch.no_grad():
        losses = [float(each(input_ids=held_out, labels=held_out).loss) for each in (cut, result)]
    assert losses == pytest.approx([training["before"], training["after"]], abs=1e-4)
    assert losses[1] < 0.9 * losses[0]
    assert _digest(model) == before
    assert result.generate(held_out[:, :4], max_new_tokens=3).shape == (6, 7)


def test_a_smaller_model_learns_from_the_model_that_it_was_made_of() -> None:
    small = compress(tiny("llama"), "low-rank{keep=0.5,method=plain}")
    with pytest.raises(SkinkError, match=r"\[RECOVER-001\]"):
        compress(small, "recover{train=new,kl=1,steps=1}", training=_rows(20, 2))
    result = compress(small, "recover{train=new,kl=1,steps=2}", training=_rows(20, 2), teacher=tiny("llama"))
    training = result.compression.result.passes[-1].result.training
    assert training is not None
    assert training["loss"] == {"kl": 1.0}
    assert training["trained"] < sum(parameter.numel() for parameter in result.parameters())


def test_what_can_be_refused_is_refused_before_any_work() -> None:
    with pytest.raises(SkinkError, match=r"\[RECOVER-005\]"):
        compress("no-such-model", "recover", calibration=_windows())
    with pytest.raises(SkinkError, match=r"\[RECOVER-009\] a teacher was named"):
        compress("no-such-model", "low-rank{method=plain}", teacher="another")
    with pytest.raises(SkinkError, match=r"\[RECOVER-009\] it was said how text to train on is read"):
        compress("no-such-model", "low-rank", training_texts=TrainingTextOptions(length=8), calibration=_windows())
    with pytest.raises(SkinkError, match=r"\[RECOVER-005\]"):
        compress_program(tiny("llama"), "recover")


def test_tokens_to_train_on_that_the_model_does_not_know_are_refused_before_any_pass_runs() -> None:
    tokens = _rows(20, 2)
    tokens[3, 5] = VOCABULARY
    seen: list[str] = []
    with pytest.raises(SkinkError, match=r"\[RECOVER-008\] (.|\n)*0 to 96"):
        compress(
            tiny("llama"),
            "low-rank{keep=0.5,method=plain}, recover{ce=1,steps=1}",
            training=tokens,
            progress=lambda name, done, total: seen.append(name),
        )
    assert "low-rank" not in seen


@pytest.mark.parametrize("loss", ["by=layer", "kl=1"])
def test_a_teacher_of_another_vocabulary_is_refused_before_any_pass_runs(loss: str) -> None:
    seen: list[str] = []
    with pytest.raises(SkinkError, match=r"\[RECOVER-006\] (.|\n)*64 tokens in its table, and the student 97"):
        compress(
            tiny("llama"),
            f"low-rank{{keep=0.5,method=plain}}, recover{{{loss},steps=1}}",
            training=_rows(20, 2),
            teacher=build("llama", vocab_size=64),
            progress=lambda name, done, total: seen.append(name),
        )
    assert "low-rank" not in seen


def test_a_loss_that_the_model_has_not_is_refused_before_any_pass_runs() -> None:
    seen: list[str] = []
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": VOCABULARY}
    encoder = BertModel(BertConfig(**sizes, num_hidden_layers=1)).eval()
    with pytest.raises(SkinkError, match=r"\[OPTION-002\] ce needs a model with logits"):
        compress(
            encoder,
            "low-rank{keep=0.5,method=plain}, recover{ce=1,steps=1}",
            training=Windows(_rows(20, 2)),
            progress=lambda name, done, total: seen.append(name),
        )
    assert "low-rank" not in seen
