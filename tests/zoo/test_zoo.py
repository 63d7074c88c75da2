"""docs/zoo.md says what is: it holds every family, enough of them work, and a fixed sample is as it says."""

from dataclasses import replace

import pytest
import torch

from skink.errors import StateError
from tests.zoo.table import PAGE, read, versions
from tests.zoo.trial import DECODERS, ENCODERS, RefusedError, one_line, try_decoder, try_encoder

# Attention through transformers' interface and written by hand, with masks of many kinds, ALiBi, sinks, latent keys and
# experts; positions counted by the model; and a model that cannot be captured.
_DECODERS = ("bart", "bloom", "cohere", "deepseek_v3", "falcon", "gpt_oss", "gptj", "mamba", "mpt")
_ENCODERS = ("bert", "deberta-v2")

_TEXT = PAGE.read_text(encoding="utf-8")
_DECODER_ROWS, _ENCODER_ROWS = read(_TEXT)

same_versions = pytest.mark.skipif(
    versions() not in _TEXT, reason=f"docs/zoo.md was made with other versions than {versions()}"
)


@same_versions
def test_every_family_is_in_the_page() -> None:
    assert tuple(_DECODER_ROWS) == DECODERS
    assert tuple(_ENCODER_ROWS) == ENCODERS


def test_enough_families_work() -> None:
    rows = _DECODER_ROWS.values()
    assert sum(row.captured == "yes" for row in rows) >= 60
    assert sum(row.stepped == "yes" for row in rows) >= 50


def test_every_no_has_a_reason() -> None:
    for row in (*_DECODER_ROWS.values(), *_ENCODER_ROWS.values()):
        marks = (row.captured, row.raised, row.stepped, row.onnx)
        assert bool(row.why) == ("no" in marks or not row.captured), row


@same_versions
@pytest.mark.parametrize("family", _DECODERS)
def test_a_decoder_is_as_the_page_says(family: str) -> None:
    said = _DECODER_ROWS[family]
    why = "" if said.onnx == "no" and "no" not in (said.captured, said.raised, said.stepped) else said.why
    assert try_decoder(family, onnx=False) == replace(said, onnx="", why=why)


@same_versions
@pytest.mark.parametrize("family", _ENCODERS)
def test_an_encoder_is_as_the_page_says(family: str) -> None:
    assert try_encoder(family) == _ENCODER_ROWS[family]


def test_reasons_are_short_and_hold_nothing_of_this_machine() -> None:
    where = (
        "/home/somebody/.venv/lib/python3.11/site-packages/transformers/models/llama/modeling_llama.py:12, in forward"
    )
    error = StateError("STATE-001", "it cannot be stepped.", where=where, why="one\ntwo")
    assert one_line(error) == "STATE-001 it cannot be stepped. at llama/modeling_llama.py:12, in forward one"
    assert one_line(RefusedError("tokens differ")) == "tokens differ"
    assert one_line(torch.OutOfMemoryError("a\n" * 400)).startswith("OutOfMemoryError: a a a")
    assert len(one_line(ValueError("x" * 1000))) < 260
