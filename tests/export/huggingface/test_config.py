from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, GPT2Config

from skink.export.huggingface import SkinkConfig, register
from tests.models import FAMILIES, tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_token_ids_are_those_of_the_source(family: str) -> None:
    source = tiny(family).config
    config = SkinkConfig.from_source(source, name="a/b", class_name="Some", tied=False, dtype=torch.float32)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        assert getattr(config, name) == getattr(source, name) is not None, name
    assert config.num_key_value_heads == getattr(source, "num_key_value_heads", 4)
    assert config.head_dim == 16
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, source.pad_token_id)
    assert config.source == {"model_type": family, "class": "Some", "name": "a/b"}


def test_the_first_source_is_kept() -> None:
    first = SkinkConfig.from_source(GPT2Config(), name="gpt2", class_name="A", tied=True, dtype=torch.float16)
    second = SkinkConfig.from_source(first, name="elsewhere", class_name="B", tied=True, dtype=torch.float32)
    assert second.source == first.source
    assert (first.dtype, second.dtype) == (torch.float16, torch.float32)


def test_it_is_read_back_as_it_was(tmp_path: Path) -> None:
    config = SkinkConfig.from_source(GPT2Config(), name="gpt2", class_name="A", tied=True, dtype=torch.bfloat16)
    config.save_pretrained(tmp_path)
    register()
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, SkinkConfig)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert loaded.dtype == torch.bfloat16
