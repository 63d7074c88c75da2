"""Tiny random decoders of the families that Skink is tested on, made once per process.

Weights are not degenerate (norms are not all ones, biases not all zeros) and windows are shorter than what tests
generate. The models are shared between tests: nothing may change them.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "gpt2": _GPT2,
    "qwen3": _COMMON | {"head_dim": 16},
    "gemma2": _COMMON | {"head_dim": 16, "sliding_window": 5},
    "mistral": _COMMON | {"sliding_window": 5},
    "phi3": _COMMON | {"sliding_window": 5},
    "gpt_neox": _COMMON,
    "olmo2": _COMMON,
    "opt": _COMMON | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "mixtral": _COMMON | {"num_local_experts": 4},
}


def build(family: str, **options: Any) -> PreTrainedModel:
    """A new tiny model of `family`, the same at every call; `options` override its configuration."""
    config = AutoConfig.for_model(family, **{**_OPTIONS[family], **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {family: partial(build, family) for family in _OPTIONS}


@cache
def tiny(family: str) -> PreTrainedModel:
    """The tiny model of `family` that all tests share."""
    return FAMILIES[family]()
