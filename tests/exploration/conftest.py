"""A tiny random Llama with the tokenizer that ships, and text to calibrate and judge on."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import skink
from skink.compression import SpeedOptions, TextOptions
from skink.evaluation import Documents
from skink.exploration import ExploreOptions

ASSETS = Path(skink.__file__).parent / "assets" / "stdlib-llama"


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS)


@pytest.fixture(scope="session")
def llama():
    """Nothing may change it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4096,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def captured(llama):
    """The same in Skink's form, which needs no capture."""
    return skink.compress(llama, [])


def _text(name, word):
    lines = [f"{word}_{index}_{index * 7 % 13} = function_{index % 11}(argument, {index})" for index in range(300)]
    lines = [line for index, line in enumerate(lines) if index % 5]
    return Documents(name, ("\n".join(lines),))


@pytest.fixture(scope="session")
def options():
    """Seconds for each point."""
    return ExploreOptions(
        calibration=_text("calibration", "value"),
        held_out=_text("held out", "result"),
        texts=TextOptions(calibration_windows=2, held_out_windows=2, length=32),
        questions=4,
        speed=SpeedOptions(prompt=4, new_tokens=3, rounds=1),
    )


@pytest.fixture(scope="session")
def space():
    """Three points; one of them can be read, and does not run."""
    return {
        "name": "small",
        "families": [
            {"name": "share", "axes": {"keep": [0.7, 0.4]}, "recipe": "low-rank{keep=$keep,method=plain}"},
            {"name": "nowhere", "recipe": "low-rank{method=plain,targets=[*.nowhere]}"},
        ],
    }
