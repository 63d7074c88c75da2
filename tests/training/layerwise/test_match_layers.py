from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

import skink
from skink.compression.compress import captured
from skink.compression.texts import read_documents
from skink.errors import OptionError, RecoveryError
from skink.evaluation import text_files, token_windows
from skink.export.huggingface import load_source
from skink.graph.calibration import token_batches
from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.graph.windows import Windows
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose import BasisSharing, LowRank, ReduceWidth
from skink.training.layerwise.match_layers import match_layers
from skink.training.loop.options import TrainOptions
from skink.training.losses.objectives import Terms
from tests.models import VOCABULARY
from tests.programs import canonical
from tests.training.layerwise.factored import BOTH, HIDDEN, factored, match, options, same, text, weights


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "opt", "phi3"])
def test_every_layer_comes_nearer_to_the_original_s(family: str) -> None:
    program, original = factored(family)
    before, kept = weights(program), weights(original)
    record = match_layers(original, program, text(), options(), terms=BOTH)
    assert len(record.layers) == 2
    for layer in record.layers:
        assert layer.after < 0.95 * layer.before
    changed = {
        name for name, tensor in program.weights() if tensor is not before[name] and (tensor != before[name]).any()
    }
    assert changed == set(record.trained)
    assert all(program.weight(name).dtype is before[name].dtype for name in before)
    assert all(torch.equal(original.weight(name), tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("at_once", [2, 0])
def test_layers_at_once_changes_rounding_only(at_once: int) -> None:
    one, program = match(terms=BOTH)
    several, other = match(terms=BOTH, layers_at_once=at_once)
    for found, expected in zip(several.losses, one.losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    for name in one.trained:
        assert (program.weight(name) - other.weight(name)).abs().mean() < 1e-6


def test_values_in_files_are_the_same_numbers() -> None:
    _, program = match()
    _, other = match(held_bytes=0)
    assert same(program, other)


def test_only_the_windows_that_are_read_are_held() -> None:
    windows = text(40)
    record, program = match(windows=windows, options=options(tokens=100, steps=None))
    assert (record.steps, record.tokens) == (4, 104)
    assert [tokens for tokens, _ in record.losses] == [32, 64, 96, 104]
    # Windows that no step reads may hold anything.
    order = torch.Generator().manual_seed(0)
    read = set(torch.randperm(40, generator=order)[:13].tolist())
    others = [row for row in range(40) if row not in read]
    changed = windows.tokens.clone()
    changed[others] = 5
    _, other = match(windows=Windows(changed), options=options(tokens=100, steps=None))
    assert same(program, other)


def test_padding_does_not_count() -> None:
    windows = text(padded=True)
    assert windows.padding is not None
    record, program = match(windows=windows, terms=BOTH)
    assert record.tokens == sum(
        int(windows.padding[rows].sum()) for rows in _batches(len(windows.tokens), steps=6, batch=4)
    )
    other_tokens = torch.where(windows.padding != 0, windows.tokens, 7)
    _, other = match(windows=Windows(other_tokens, padding=windows.padding), terms=BOTH)
    for name in record.trained:
        assert (program.weight(name) - other.weight(name)).abs().mean() < 1e-6


def _batches(windows: int, *, steps: int, batch: int) -> list[list[int]]:
    """The windows of each step, as the order of a run with seed 0 is described: round after round."""
    order: list[int] = []
    while len(order) < steps * batch:
        generator = torch.Generator().manual_seed(len(order) // windows)
        order += torch.randperm(windows, generator=generator).tolist()
    return [order[start : start + batch] for start in range(0, steps * batch, batch)]


def test_it_trains_what_is_asked_for() -> None:
    record, _ = match(train="*.mlp.*", ignore=("*.up_proj.*",))
    assert record.trained
    assert all(".mlp." in name and "up_proj" not in name for name in record.trained)
    # The first layer has nothing to train: its values only go on.
    record, _ = match(train="model.layers.1.*")
    assert [layer.name for layer in record.layers] == ["model.layers.1"]


def test_attention_alone_trains_attention_alone() -> None:
    program, original = factored()
    before = weights(program)
    record = match_layers(original, program, text(), options(), terms=Terms(attention=2.0))
    assert set(record.terms) == {"attention"}
    assert record.losses[0][1] == pytest.approx(2 * record.terms["attention"][0])
    changed = {name for name, tensor in program.weights() if not torch.equal(tensor, before[name])}
    assert changed == set(record.trained)
    assert all(".self_attn." in name for name in changed)
    with pytest.raises(RecoveryError, match="nothing to train"):
        match(terms=Terms(attention=1.0), train="*.mlp.*")


def test_patterns_choose_the_places() -> None:
    whole, program = match(terms=BOTH)
    record, other = match(terms=BOTH, patterns=("model.layers.1",))
    assert record.layers == whole.layers[1:]
    assert all(torch.equal(program.weight(name), other.weight(name)) for name in record.trained)
    # Within a layer: what comes behind the place does not train.
    record, program = match(patterns=("model.layers.1.self_attn",))
    assert record.trained
    assert all(name.startswith("model.layers.1.self_attn.") for name in record.trained)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_half_precision_weights_stay_half_precision(precision: str) -> None:
    program, original = factored()
    program, original = (entry.with_dtype(torch.bfloat16) for entry in (program, original))
    record = match_layers(original, program, text(), options(precision=precision), terms=BOTH)
    assert all(layer.after < layer.before for layer in record.layers)
    assert {program.weight(name).dtype for name in record.trained} == {torch.bfloat16}


def test_layers_that_share_a_basis_train_together() -> None:
    original = canonical("llama")
    program = original.clone()
    sharing = BasisSharing(keep=0.6, method="whitened", group=2)
    Pipeline((sharing,), start=original.stage).run(program, calibration=text().tokens)
    record = match_layers(original, program, text(), options(), terms=BOTH)
    (layer,) = record.layers
    assert layer.name == "model.layers.0 to model.layers.1"
    assert layer.after < 0.95 * layer.before


@pytest.mark.parametrize("change", [ReduceWidth(keep=0.6), LowRank(keep=0.6)])
def test_it_works_after_other_passes(change: Any) -> None:
    original = canonical("llama")
    program = original.clone()
    Pipeline((change,), start=original.stage).run(program, calibration=text().tokens)
    record = match_layers(original, program, text(), options(learning_rate=3e-4), terms=BOTH, train="all")
    assert all(layer.after < layer.before for layer in record.layers)


def test_an_encoder_with_norms_behind_its_layers() -> None:
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model("bert", **small, num_hidden_layers=2)).eval()
    original = capture(model)
    Pipeline((Canonicalize(),)).run(original, verify=0)
    program = original.clone()
    Pipeline((LowRank(method="plain", keep=0.5),), start=original.stage).run(program)
    record = match_layers(original, program, text(padded=True), options(), terms=BOTH)
    assert [layer.name for layer in record.layers] == ["encoder.layer.0", "encoder.layer.1"]
    assert all(layer.after < layer.before for layer in record.layers)


def test_a_layer_that_is_as_it_was_has_no_loss() -> None:
    original = canonical("llama")
    record = match_layers(original, original.clone(), text(), options(steps=1), terms=BOTH, train="all")
    assert [layer.before for layer in record.layers] == [0.0, 0.0]


def test_a_layer_that_training_makes_worse_is_left_as_it_was() -> None:
    program, original = factored()
    before = weights(program)
    record = match_layers(original, program, text(), options(steps=1, warmup=0.0, learning_rate=0.3), terms=HIDDEN)
    assert all(layer.after == layer.before > 0 for layer in record.layers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(program).items())


def test_other_terms_and_sharding_are_refused() -> None:
    with pytest.raises(OptionError, match="there is no kl") as caught:
        match(terms=Terms(hidden=1.0, kl=1.0))
    assert caught.value.code == "OPTION-002"
    with pytest.raises(OptionError, match="sharding=full has no use"):
        match(options=options(sharding="full"))
    with pytest.raises(OptionError, match="layers_at_once"):
        match(layers_at_once=-1)


def test_nothing_to_train_in_the_layers_is_said() -> None:
    with pytest.raises(RecoveryError, match="there is nothing to train") as caught:
        match(train="model.norm.*")
    assert caught.value.code == "RECOVER-001"


def test_no_text_is_said() -> None:
    with pytest.raises(RecoveryError) as caught:
        match(windows=Windows(torch.zeros(0, 8, dtype=torch.int64)))
    assert caught.value.code == "RECOVER-008"


def test_numbers_that_are_not_finite_are_said_with_their_layer() -> None:
    program, original = factored()
    name = "model.layers.1.mlp.down_proj.up.weight"
    program.set_weight(name, torch.full_like(program.weight(name), torch.nan))
    with pytest.raises(RecoveryError) as caught:
        match_layers(original, program, text(), options(), terms=HIDDEN)
    assert caught.value.code == "RECOVER-003"
    assert caught.value.what == "training of model.layers.1 cannot begin: its error is not finite."
    assert caught.value.why == f"the weight {name!r} was not finite before the first step."


def test_progress_ends_where_it_said() -> None:
    seen: list[tuple[int, int]] = []
    said: list[str] = []
    match(progress=lambda done, total: seen.append((done, total)), status=said.append)
    assert seen[-1][0] == seen[-1][1] == len(seen)
    assert len({total for _, total in seen}) == 1
    assert said[0].startswith("model.layers.0 · loss ")
    assert said[-1].startswith("model.layers.1 · loss ")


@pytest.mark.slow
def test_the_model_that_ships_wins_back_much_of_what_low_rank_lost() -> None:
    model, tokenizer = load_source("stdlib-llama")
    original = captured(model)
    Pipeline((Canonicalize(),)).run(original, verify=0)
    program = original.clone()
    Pipeline((LowRank(method="plain", keep=0.4),), start=original.stage).run(program)
    documents = read_documents("stdlib", split="held-out")
    held_out = token_windows(documents, tokenizer, length=96, count=8)
    before = held_out_loss(program, held_out)
    source = text_files([Path(skink.__file__).parent / "graph"])
    windows = token_windows(source, tokenizer, length=64, count=24)
    record = match_layers(original, program, Windows(windows), TrainOptions(batch=4, learning_rate=1e-3), terms=HIDDEN)
    assert len(record.layers) == 8
    assert all(layer.after < 0.8 * layer.before for layer in record.layers)
    dense, after = held_out_loss(original, held_out), held_out_loss(program, held_out)
    assert dense < after < dense + 0.8 * (before - dense)


def held_out_loss(program: Program, windows: Tensor) -> float:
    (batch,) = token_batches(program, windows, batch=len(windows))
    logits = program(**batch)[0][:, :-1].float()
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
