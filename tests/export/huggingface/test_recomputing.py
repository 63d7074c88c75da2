from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForSequenceClassification

import skink
from skink.errors import ModelError
from skink.export.huggingface import SkinkForCausalLM, to_huggingface
from skink.export.huggingface.recomputing import bind_in_regions
from skink.graph.emit import build_tree
from tests.export.huggingface.built import factored_program, fresh
from tests.export.huggingface.test_encoders import SMALL
from tests.models import tiny
from tests.programs import batch, canonical

INPUTS = batch(2, 9, padding=3)


def trained_step(model: nn.Module, forward: Callable[..., Any] | None = None) -> tuple[float, dict[str, Tensor]]:
    """The loss, and gradients by name."""
    model.zero_grad()
    call = model if forward is None else forward
    loss = call(input_ids=INPUTS.input_ids, attention_mask=INPUTS.attention_mask, labels=INPUTS.input_ids).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-7)


@contextmanager
def calls_of(layer: nn.Module) -> Iterator[list[None]]:
    seen: list[None] = []
    handle = layer.register_forward_hook(lambda *_: seen.append(None))
    yield seen
    handle.remove()


@contextmanager
def bytes_saved() -> Iterator[list[int]]:
    """Bytes of what autograd saves outside of what is computed anew."""
    seen: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.numel() * tensor.element_size())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_loss_and_gradients_are_the_same(family: str) -> None:
    model = fresh(family).train()
    expected = trained_step(model)
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    assert_same(trained_step(model), expected)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    assert_same(trained_step(model), expected)


def test_layers_are_computed_twice_and_little_is_kept() -> None:
    model = fresh("llama").train()
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    kept = []
    for times in (1, 2):
        with calls_of(layer) as calls, bytes_saved() as saved:
            trained_step(model)
        assert len(calls) == times
        kept.append(sum(saved))
        model.activation_checkpointing_enable()
    assert kept[1] < kept[0] / 2


def test_the_last_region_is_computed_once() -> None:
    model = fresh("llama").train()
    model.activation_checkpointing_enable()
    with calls_of(model.get_submodule("lm_head")) as calls:
        trained_step(model)
    assert len(calls) == 1


def test_only_in_training_with_gradients() -> None:
    model = fresh("llama").train()
    model.activation_checkpointing_enable()
    expected = model.eval()(*INPUTS).logits
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    with calls_of(layer) as calls:
        model(*INPUTS).logits.sum().backward()
    assert len(calls) == 1
    with torch.no_grad():
        torch.testing.assert_close(model.train()(*INPUTS).logits, expected)
    assert model.generate(INPUTS.input_ids[:, 3:], max_new_tokens=3, min_new_tokens=3).shape == (2, 9)


def test_some_regions_can_be_kept() -> None:
    model = fresh("llama").train()
    expected = trained_step(model)
    kept = []
    for every in (1, 2, 100):
        model.activation_checkpointing_enable(every_n_layers=every)
        with bytes_saved() as saved:
            assert_same(trained_step(model), expected)
        kept.append(sum(saved))
    assert kept[0] < kept[1] < kept[2]


def test_the_form_that_would_lose_gradients_is_refused() -> None:
    with pytest.raises(ModelError, match="use_reentrant=True is not supported") as caught:
        fresh("llama").activation_checkpointing_enable({"use_reentrant": True})
    assert caught.value.code == "MODEL-005"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_on_frozen_weights_get_the_same_gradients(dropout: float) -> None:
    def adapted(recompute: bool) -> tuple[float, dict[str, Tensor]]:
        model: SkinkForCausalLM = to_huggingface(factored_program(), tiny("llama").config)
        if recompute:
            model.activation_checkpointing_enable()
        config = LoraConfig(r=2, target_modules=["down", "up", "v_proj"], lora_dropout=dropout)
        torch.manual_seed(0)
        peft = get_peft_model(model, config).train()
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        return trained_step(peft)

    state = torch.random.get_rng_state()
    found, expected = adapted(True), adapted(False)
    torch.random.set_rng_state(state)
    assert expected[1]
    assert_same(found, expected)


def test_under_autocast() -> None:
    model = fresh("llama").train()
    with torch.autocast("cpu", torch.bfloat16):
        expected = trained_step(model)
        model.activation_checkpointing_enable()
        assert_same(trained_step(model), expected)


def test_compiled() -> None:
    model = fresh("llama").train()
    expected = trained_step(model)
    model.activation_checkpointing_enable()
    loss, gradients = trained_step(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert loss == pytest.approx(expected[0], rel=1e-6)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


class Tree:
    """A tree that notes which regions run."""

    def __init__(self, tree: nn.Module) -> None:
        self.tree, self.ran = tree, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tree, name)

    def run_region(self, index: int, run: Callable[..., Any], *args: Any) -> Any:
        self.ran.append(index)
        return run(*args)


def test_regions_are_counted_down_to_the_one_before_the_last() -> None:
    program = canonical("llama")
    tree = Tree(build_tree([program]))
    (logits,) = bind_in_regions(program)(tree, *INPUTS)
    assert tree.ran == [*reversed(range(len(tree.ran)))]
    assert len(tree.ran) >= 3
    torch.testing.assert_close(logits, program(*INPUTS)[0])


def test_encoders() -> None:
    config = AutoConfig.for_model("bert", **SMALL | {"num_hidden_layers": 3}, num_labels=2)
    model = skink.compress(AutoModelForSequenceClassification.from_config(config).eval(), "canonicalize").train()
    inputs = {"input_ids": INPUTS.input_ids, "attention_mask": INPUTS.attention_mask, "labels": torch.tensor([0, 1])}

    def run() -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = run()
    model.activation_checkpointing_enable()
    with calls_of(model.get_submodule("bert.encoder.layer.0.intermediate.dense")) as calls:
        assert_same(run(), expected)
    assert len(calls) == 2
