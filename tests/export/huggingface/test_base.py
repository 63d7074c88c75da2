import pytest
import torch
from torch import nn

from skink.errors import ModelError
from skink.export.huggingface import SkinkConfig, SkinkForCausalLM, to_huggingface
from skink.graph.serialization import program_to_json
from tests.export.huggingface.built import factored_model, fresh, skink_model
from tests.models import tiny
from tests.programs import batch, canonical


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_state_has_the_names_of_the_source(family: str) -> None:
    source, model = tiny(family), skink_model(family)
    buffers = {name for name, _ in source.named_buffers()}
    assert set(model.state_dict()) - buffers == set(source.state_dict())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert set(parameters) == set(dict(source.named_parameters(remove_duplicate=False)))
    assert sum(tensor.numel() for tensor in model.parameters()) == sum(t.numel() for t in source.parameters())


def test_factored_layers_are_two_linear_layers() -> None:
    layer = factored_model().get_submodule("model.layers.1.mlp.up_proj")
    assert [(name, type(child)) for name, child in layer.named_children()] == [("down", nn.Linear), ("up", nn.Linear)]
    assert list(layer.up.weight.shape) == [128, 6]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_embeddings_and_head_are_found_and_can_be_replaced(family: str) -> None:
    source, model = tiny(family), fresh(family)
    assert torch.equal(model.get_input_embeddings().weight, source.get_input_embeddings().weight)
    assert torch.equal(model.get_output_embeddings().weight, source.get_output_embeddings().weight)
    tokens = batch(1, 5).input_ids
    head = nn.Linear(64, 11, bias=False)
    model.set_output_embeddings(head)
    assert model(tokens).logits.shape == (1, 5, 11)
    other = nn.Embedding(97, 64)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other


def test_the_program_has_the_weights_of_the_model() -> None:
    model, inputs = fresh("llama"), batch(2, 6, padding=2)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
        expected = model(*inputs).logits
    assert torch.allclose(model.program(*inputs)[0], expected, atol=1e-5)
    assert program_to_json(model.program) == program_to_json(canonical("llama"))


def test_a_configuration_alone_is_not_enough() -> None:
    with pytest.raises(ModelError, match="cannot be made from its configuration alone") as caught:
        SkinkForCausalLM(SkinkConfig())
    assert caught.value.code == "MODEL-001"


def test_weights_tied_by_their_program_are_tied() -> None:
    assert skink_model("gpt2").config.tie_word_embeddings
    assert skink_model("gpt2")._tied_weights_keys == {"lm_head.weight": "transformer.wte.weight"}
    untied = to_huggingface(canonical("llama"), tiny("llama").config)
    assert not untied.config.tie_word_embeddings
