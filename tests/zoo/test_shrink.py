"""Tiny configurations are tiny, and keep every kind of layer."""

import pytest
import torch

from tests.zoo.shrink import VOCABULARY, decoder_config, encoder_config


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt_neo", "mpt", "deepseek_v3", "gemma3", "bart", "mixtral"])
def test_decoders_are_tiny(family: str) -> None:
    config, cls = decoder_config(family)
    assert config.get_text_config().vocab_size == VOCABULARY
    with torch.device("meta"):
        model = cls._from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6


def test_every_kind_of_layer_stays() -> None:
    config, _ = decoder_config("gemma2")
    assert sorted(set(config.layer_types)) == ["full_attention", "sliding_attention"]
    assert config.num_hidden_layers == 2
    config, _ = decoder_config("zamba")
    assert config.layers_block_type == ["linear_attention", "hybrid", "linear_attention", "hybrid"]


def test_heads_that_share_keys_still_do() -> None:
    config, _ = decoder_config("mistral")
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    config, _ = decoder_config("olmo")
    assert config.num_attention_heads == config.num_key_value_heads == 4


def test_a_decoder_is_set_to_decode() -> None:
    config, _ = decoder_config("bert")
    assert config.is_decoder
    config, _ = encoder_config("bert")
    assert not config.is_decoder
