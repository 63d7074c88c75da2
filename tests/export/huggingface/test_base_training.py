"""Training of a Skink model by others' loops, and generation after it."""

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from skink.errors import ModelError
from skink.export.huggingface import SkinkForCausalLM, to_huggingface
from skink.graph.pipeline import Pipeline
from skink.kernels.cpp.library import library
from skink.passes.decompose.low_rank import LowRank
from tests.export.huggingface.built import factored_program, fresh
from tests.models import tiny
from tests.programs import batch, canonical

ROWS = [{"input_ids": row, "labels": row.masked_fill(row % 5 == 0, -100)} for row in batch(16, 9).input_ids]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    common: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**common, **options})


def weights(model: SkinkForCausalLM) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_trainer_saves_loads_and_resumes(tmp_path: Path) -> None:
    model = fresh("llama")
    before = weights(model)
    options = arguments(tmp_path, save_strategy="steps", save_steps=2)
    trainer = Trainer(model, options, train_dataset=ROWS)
    trainer.train()
    assert not torch.equal(weights(model)["model.norm.weight"], before["model.norm.weight"])
    assert trainer.state.log_history[-1]["train_loss"] > 0
    assert_equal(weights(SkinkForCausalLM.from_pretrained(tmp_path / "checkpoint-4")), weights(model))
    resumed = fresh("llama")
    Trainer(resumed, options, train_dataset=ROWS).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(resumed), weights(model))
    trainer.save_model(str(tmp_path / "final"))
    again = SkinkForCausalLM.from_pretrained(tmp_path / "final")
    assert torch.equal(again(batch(2, 9).input_ids).logits, model.eval()(batch(2, 9).input_ids).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_trainer_gives_what_it_gives_the_source(family: str, tmp_path: Path) -> None:
    """With accumulation, so that the mean is over the labels of a step and not of its parts."""
    options = {"gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    source, model = copy.deepcopy(tiny(family)), fresh(family)
    for subject in (source, model):
        Trainer(subject, arguments(tmp_path, **options), train_dataset=ROWS).train()
    expected = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-5)


def test_accumulated_steps_are_whole_ones(tmp_path: Path) -> None:
    found = []
    for size, parts in ((4, 1), (1, 4)):
        model = fresh("llama")
        options = arguments(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            optim="sgd",
            learning_rate=0.1,
        )
        Trainer(model, options, train_dataset=ROWS).train()
        found.append(weights(model))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"bf16": True}, {"activation_checkpointing": True}], ids=["bf16", "checkpointing"])
def test_the_trainers_options_for_memory(options: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for chosen in ({}, options):
        model = to_huggingface(factored_program(), tiny("llama").config)
        Trainer(model, arguments(tmp_path, optim="sgd", learning_rate=0.1, **chosen), train_dataset=ROWS).train()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        found.append(weights(model))
    close = 3e-2 if "bf16" in options else 1e-6
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=close, atol=close)


@pytest.mark.parametrize("break_even", ["off", "measure"])
def test_generation_after_training_reads_the_new_weights(break_even: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiled kernels, which were bound to the model's layers before."""
    monkeypatch.setenv("SKINK_BREAK_EVEN", break_even)
    model = to_huggingface(factored_program(), tiny("llama").config)
    prompt = batch(2, 5).input_ids
    stale = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, output_logits=True, return_dict_in_generate=True)
    functions = len(model._functions.bound)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        model.zero_grad()
        model.train()(prompt, labels=prompt).loss.backward()
        optimizer.step()
    model.eval()
    found = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, output_logits=True, return_dict_in_generate=True)
    assert len(model._functions.bound) == functions + 1, "training has a function of its own; none was made anew"
    again = to_huggingface(model.program, tiny("llama").config)
    expected = again.generate(
        prompt, max_new_tokens=8, min_new_tokens=8, output_logits=True, return_dict_in_generate=True
    )
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert not torch.allclose(found.logits[0], stale.logits[0], atol=1e-3)


def test_gradients_flow_although_compiled_kernels_serve_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKINK_BREAK_EVEN", "off")
    if not library().available:
        pytest.skip(library().reason)
    program = factored_program()
    model = to_huggingface(program, tiny("llama").config)
    tokens = batch(1, 5).input_ids
    with torch.no_grad():
        model(tokens)
    by_kernels = {variant.training: str(model._functions._prepared(variant)) for variant in model._functions.bound}
    assert "skink_cpp.rms_norm" in by_kernels[False]
    assert "fuse-low-rank" in by_kernels[False]
    found = model.eval()(tokens).logits
    by_kernels = {variant.training: str(model._functions._prepared(variant)) for variant in model._functions.bound}
    assert "skink_cpp" not in by_kernels[True]
    assert "fuse-low-rank" not in by_kernels[True]
    found.square().mean().backward()
    emitted = program.module()
    positions = torch.arange(5)[None]
    emitted(tokens, torch.ones_like(tokens), positions).square().mean().backward()
    for name, parameter in emitted.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-7)


def test_more_tokens_train_and_are_saved(tmp_path: Path) -> None:
    model = fresh("gemma2")
    before = weights(model)["model.embed_tokens.weight"]
    model.resize_token_embeddings(120, mean_resizing=False)
    tokens = torch.tensor([[1, 5, 110, 119]])
    assert model(tokens).logits.shape == (1, 4, 120)
    model.train()(tokens, labels=tokens).loss.backward()
    assert model.get_input_embeddings().weight.grad.shape == (120, 64)
    assert torch.equal(model.get_input_embeddings().weight[:97], before)
    model.save_pretrained(tmp_path)
    again = SkinkForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


@pytest.mark.parametrize("form", ["thin", "pivoted"])
def test_more_tokens_are_refused_where_no_one_layer_gives_the_logits(form: Literal["thin", "pivoted"]) -> None:
    program = canonical("llama")
    passes = (LowRank(method="plain", keep=0.6, form=form, targets=("lm_head",)),)
    Pipeline(passes, start=program.stage).run(program)
    model = to_huggingface(program, tiny("llama").config)
    tokens = batch(1, 4).input_ids
    if form == "pivoted":
        assert model.get_output_embeddings() is None
        with pytest.raises(ModelError, match="no one linear layer gives the logits") as caught:
            model.resize_token_embeddings(120)
        assert caught.value.code == "MODEL-005"
        assert model(tokens, labels=tokens).logits.shape == (1, 4, 97)
    else:
        model.resize_token_embeddings(120, mean_resizing=False)
        assert model(tokens, labels=tokens).logits.shape == (1, 4, 120)
