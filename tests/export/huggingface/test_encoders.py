"""Encoders in our form, of several families and with each head: what they return, how they are saved and loaded."""

import copy
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import skink
from skink.compression import compress
from skink.errors import ModelError
from skink.export.huggingface.encoders import (
    SkinkForMaskedLM,
    SkinkForQuestionAnswering,
    SkinkForSequenceClassification,
    SkinkForTokenClassification,
    SkinkModel,
)
from tests.export.huggingface.built import fingerprint
from tests.models import VOCABULARY

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 2},
    "electra": {"embedding_size": 24},
    "mpnet": {},
    # One layer that attends to all, and one to what is near.
    "modernbert": {"num_hidden_layers": 2, "local_attention": 4, "global_attn_every_n_layers": 2},
}
RECIPE = "low-rank{keep=0.7,method=plain,baseline=false}"
HEADS = {
    "MaskedLM": SkinkForMaskedLM,
    "SequenceClassification": SkinkForSequenceClassification,
    "TokenClassification": SkinkForTokenClassification,
    "QuestionAnswering": SkinkForQuestionAnswering,
}


@cache
def source(family: str, head: str = "") -> Any:
    """A tiny random encoder whose norms and biases are not those that it begins with."""
    auto = getattr(transformers, f"AutoModelFor{head}") if head else AutoModel
    options: dict[str, Any] = {"num_labels": 3} if "Classification" in head else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(AutoConfig.for_model(family, **SMALL | FAMILIES[family], **options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@cache
def ours(family: str, head: str = "") -> Any:
    return compress(source(family, head), verify=0)


def texts(batch: int = 3, length: int = 11) -> dict[str, Tensor]:
    """Token ids, padded behind; none of the tokens is the padding's."""
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, length - 2 * row :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def results(model: Any, **inputs: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(model(**inputs))


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], mask: Tensor, tolerance: float = 1e-5) -> None:
    """Equal but for what was computed for padding."""
    for name, value in wanted.items():
        shown, exact = found[name], value
        if value.shape[:2] == mask.shape:
            real = mask.bool().reshape(*mask.shape, *[1] * (value.dim() - 2))
            shown, exact = found[name].masked_fill(~real, 0), value.masked_fill(~real, 0)
        torch.testing.assert_close(shown, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_the_source(family: str) -> None:
    model = ours(family)
    assert type(model) is SkinkModel
    for inputs in (texts(), texts(1, 5), texts(2, 17)):
        wanted = results(source(family), **inputs)
        found = results(model, **inputs)
        assert set(found) == set(wanted)
        assert_close(found, wanted, inputs["attention_mask"])
    plain = texts(1, 9)
    assert_close(
        results(model, input_ids=plain["input_ids"]),
        results(source(family), input_ids=plain["input_ids"]),
        plain["attention_mask"],
    )


@pytest.mark.parametrize("head", HEADS)
def test_each_head_has_its_class_which_its_auto_class_loads(head: str, tmp_path: Path) -> None:
    model = ours("bert", head)
    assert type(model) is HEADS[head]
    inputs = texts() | {"token_type_ids": (torch.arange(11) > 4).long().expand(3, -1)}
    wanted = results(source("bert", head), **inputs)
    found = results(model, **inputs)
    assert_close(found, wanted, inputs["attention_mask"])
    model.save_pretrained(tmp_path)
    for loaded in (getattr(transformers, f"AutoModelFor{head}").from_pretrained(tmp_path), skink.load(tmp_path)):
        assert type(loaded) is HEADS[head]
        assert fingerprint(loaded) == fingerprint(model)
        again = results(loaded, **inputs)
        assert all(torch.equal(again[name], found[name]) for name in found)


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_is_that_of_the_source(head: str) -> None:
    labels: dict[str, Tensor] = {
        "MaskedLM": {"labels": texts()["input_ids"].masked_fill(texts()["attention_mask"] == 0, -100)},
        "SequenceClassification": {"labels": torch.tensor([0, 2, 1])},
        "TokenClassification": {"labels": texts()["input_ids"] % 3},
        "QuestionAnswering": {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([3, 2, 1])},
    }[head]
    found = results(ours("bert", head), **texts(), **labels)["loss"]
    torch.testing.assert_close(found, results(source("bert", head), **texts(), **labels)["loss"])


# Those with what the others have not: a pooler and kinds of tokens, positions that are counted, rotary and local ones.
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_a_factored_encoder_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = compress(ours(family), RECIPE, verify=1)
    assert any(layer.decision == "factored" for layer in model.compression.result.layers)
    before = results(model, **texts())
    exact = results(source(family), **texts())["last_hidden_state"]
    assert 1e-3 < float((before["last_hidden_state"] - exact).norm() / exact.norm()) < 1
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is SkinkModel
    after = results(loaded, **texts())
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_folder_of_another_kind_is_refused_and_the_right_class_named(tmp_path: Path) -> None:
    ours("bert", "MaskedLM").save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(ModelError, match=r"\[MODEL-005\] the model is no Skink") as caught:
            auto.from_pretrained(tmp_path)
        assert caught.value.why == "it was saved as SkinkForMaskedLM."
        assert "AutoModelForMaskedLM" in caught.value.fix


def test_a_program_with_other_results_is_refused() -> None:
    model = ours("bert")
    with pytest.raises(ModelError, match=r"\[MODEL-005\] the model is no SkinkForMaskedLM") as caught:
        SkinkForMaskedLM(skink.export.huggingface.SkinkConfig(), model.program)
    assert caught.value.why == "its graph returns last_hidden_state, pooler_output."


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"position_ids": torch.arange(11)[None]},
        {"inputs_embeds": torch.zeros(1, 11, 32)},
    ],
    ids=lambda entry: next(iter(entry)),
)
def test_what_a_graph_cannot_give_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=rf"\[MODEL-005\] {next(iter(arguments))} is not supported"):
        ours("bert")(**texts(), **arguments)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match=r"\[MODEL-005\] input_ids is missing"):
        ours("bert")(attention_mask=torch.ones(1, 3))
    with pytest.raises(ModelError, match=r"attention_mask has the shape \[1, 3\], and input_ids \[3, 11\]"):
        ours("bert")(texts()["input_ids"], torch.ones(1, 3))
    kinds = torch.zeros(3, 11, dtype=torch.int64)
    results(ours("distilbert"), **texts(), token_type_ids=kinds)
    with pytest.raises(ModelError, match=r"token_type_ids tell two texts apart"):
        ours("distilbert")(**texts(), token_type_ids=kinds + 1)


def test_padding_changes_nothing() -> None:
    inputs = texts(2, 9)
    whole = results(ours("bert"), **inputs)["last_hidden_state"]
    real = int(inputs["attention_mask"][1].sum())
    alone = results(ours("bert"), input_ids=inputs["input_ids"][1:, :real])["last_hidden_state"]
    torch.testing.assert_close(whole[1:, :real], alone, rtol=1e-5, atol=1e-5)


def test_a_tuple_a_copy_and_a_pickle() -> None:
    model = copy.deepcopy(ours("bert"))
    model.compression = None
    with torch.no_grad():
        hidden, pooled = model(**texts(), return_dict=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = results(other, **texts())
        assert torch.equal(found["last_hidden_state"], hidden)
        assert torch.equal(found["pooler_output"], pooled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision(dtype: torch.dtype) -> None:
    found = results(copy.deepcopy(ours("bert")).to(dtype), **texts())["last_hidden_state"]
    wanted = results(source("bert"), **texts())["last_hidden_state"]
    real = texts()["attention_mask"].bool()
    assert found.dtype is dtype
    error = float((found.float() - wanted)[real].norm() / wanted[real].norm())
    assert 1e-5 < error < 0.05


def test_it_trains() -> None:
    model = copy.deepcopy(ours("bert", "SequenceClassification")).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    labels = torch.tensor([0, 2, 1])
    losses = []
    for _ in range(8):
        loss = model(**texts(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_embeddings_and_heads_are_found() -> None:
    masked, plain = ours("bert", "MaskedLM"), ours("bert")
    assert masked.get_input_embeddings().weight.shape == (VOCABULARY, 32)
    # Its weight is the embedding's, and its bias the head's: no one layer.
    assert masked.get_output_embeddings() is None
    assert "cls.predictions.decoder.weight" in masked.program.aliases
    assert plain.get_output_embeddings() is None


def test_an_encoder_of_ours_is_compressed_again(tmp_path: Path) -> None:
    ours("bert").save_pretrained(tmp_path)
    again, direct = (compress(each, RECIPE, verify=0) for each in (str(tmp_path), ours("bert")))
    assert fingerprint(again) == fingerprint(direct)


def test_the_configuration_keeps_the_classes() -> None:
    config = ours("bert", "SequenceClassification").config
    assert (config.num_labels, config.id2label[2]) == (3, "LABEL_2")
