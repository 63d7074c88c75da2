"""What `skink inspect` says of a program, against what the model's configuration and weights say."""

import pytest
from transformers import FalconConfig, FalconForCausalLM

from skink.cli.inspection import as_json, inspect_program
from skink.graph.capture import capture
from tests.models import tiny


@pytest.fixture(scope="module")
def mistral():
    return inspect_program(capture(tiny("mistral")), context=32)


def test_each_layer_has_its_attention_norms_and_linears(mistral) -> None:
    config = tiny("mistral").config
    named = [layer for layer in mistral.layers if layer.name]
    assert [layer.name for layer in named] == ["model.layers.0", "model.layers.1"]
    for layer in named:
        (attention,) = layer.attention
        assert attention.heads == config.num_attention_heads
        assert attention.kv_heads == config.num_key_value_heads
        assert attention.window == config.sliding_window
        assert [norm.kind for norm in layer.norms] == ["rms_norm", "rms_norm"]
        assert len(layer.linear) == 7


def test_parameters_add_up_to_the_models(mistral) -> None:
    expected = sum(parameter.numel() for parameter in tiny("mistral").parameters())
    assert sum(layer.parameters for layer in mistral.layers) == expected
    assert mistral.cost.parameters == expected


def test_a_window_is_a_ring_of_one_less(mistral) -> None:
    states = [state for layer in mistral.layers for state in layer.state]
    assert {state.growth for state in states} == {"ring"}
    assert {state.limit for state in states} == {tiny("mistral").config.sliding_window - 1}


def test_the_captured_program_is_left_alone() -> None:
    program = capture(tiny("llama"))
    before = str(program)
    inspect_program(program, context=8)
    assert str(program) == before


def test_feed_forward_blocks_stand_with_their_layer(mistral) -> None:
    config = tiny("mistral").config
    for layer in mistral.layers[:-1]:
        (block,) = layer.feed_forward
        assert block.name == f"{layer.name}.mlp"
        assert (block.kind, block.activation, block.width) == ("gated", "silu", config.intermediate_size)
        assert "silu" not in layer.operators
    assert mistral.layers[-1].feed_forward == []
    assert mistral.refused == []


def test_a_constant_of_a_layer_makes_no_layer_of_its_own() -> None:
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = FalconForCausalLM(FalconConfig(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    inspected = inspect_program(capture(model), context=8)
    assert [layer.name for layer in inspected.layers] == ["transformer.h.0", "transformer.h.1", ""]


def test_experts_name_their_router() -> None:
    inspected = inspect_program(capture(tiny("mixtral")), context=8)
    (block,) = inspected.layers[1].feed_forward
    assert (block.kind, block.experts, block.chosen) == ("experts", 4, 2)
    assert block.router == "model.layers.1.mlp.gate"
    assert inspected.refused == []
    layer = as_json(inspected)["layers"][1]
    assert layer["feed_forward"][0]["router"] == "model.layers.1.mlp.gate"
    weights = {other["name"]: other["used_by"] for other in layer["others"]}
    assert weights == {f"model.layers.1.mlp.experts.{name}_proj": "skink.experts" for name in ("gate_up", "down")}
