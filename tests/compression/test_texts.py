"""Calibration and held-out text: where it comes from, and that the two never overlap."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from skink.compression.texts import (
    TextOptions,
    calibration_and_held_out,
    calibration_windows,
    encoder_texts,
    known_tokens,
    longest_text,
)
from skink.errors import SkinkError
from skink.evaluation import Documents
from skink.export.huggingface.loading import load_source

OPTIONS = TextOptions(calibration_windows=6, held_out_windows=3, length=16)


@pytest.fixture(scope="module")
def tokenizer() -> AutoTokenizer:
    _, tokenizer = load_source("stdlib-llama")
    return tokenizer


def test_the_standard_library_is_judged_on_its_own_split(tokenizer: AutoTokenizer) -> None:
    calibration, held_out = calibration_and_held_out(tokenizer, "stdlib", None, OPTIONS, longest=None)
    assert calibration is not None
    assert held_out is not None
    assert calibration.tokens.shape == (6, 16)
    assert held_out.tokens.shape == (3, 16)
    assert calibration.sha256 != held_out.sha256


def test_of_user_text_one_window_in_ten_is_held_out(tokenizer: AutoTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(str(number) for number in range(2000)))
    options = TextOptions(calibration_windows=10_000, held_out_windows=10_000, length=16)
    calibration, held_out = calibration_and_held_out(tokenizer, [path], None, options, longest=None)
    assert calibration is not None
    assert held_out is not None
    total = calibration.tokens.shape[0] + held_out.tokens.shape[0]
    assert held_out.tokens.shape[0] == total // 10
    seen = {tuple(window) for window in calibration.tokens.tolist()}
    assert not any(tuple(window) in seen for window in held_out.tokens.tolist())
    assert "held out" in held_out.source


def test_windows_are_spread_over_the_text(tokenizer: AutoTokenizer) -> None:
    documents = Documents("numbers", (" ".join(str(number) for number in range(5000)),))
    few = TextOptions(calibration_windows=3, held_out_windows=2, length=16)
    calibration, _ = calibration_and_held_out(tokenizer, documents, None, few, longest=None)
    everything = TextOptions(calibration_windows=10_000, held_out_windows=2, length=16)
    all_windows, _ = calibration_and_held_out(tokenizer, documents, None, everything, longest=None)
    assert calibration is not None
    assert all_windows is not None
    assert torch.equal(calibration.tokens[0], all_windows.tokens[0])
    assert torch.equal(calibration.tokens[-1], all_windows.tokens[-1])


def test_windows_fit_the_models_positions(tokenizer: AutoTokenizer) -> None:
    calibration, held_out = calibration_and_held_out(tokenizer, "stdlib", "stdlib", OPTIONS, longest=8)
    assert calibration is not None
    assert held_out is not None
    assert calibration.tokens.shape[1] == held_out.tokens.shape[1] == 8


def test_held_out_text_alone_calibrates_nothing(tokenizer: AutoTokenizer) -> None:
    calibration, held_out = calibration_and_held_out(tokenizer, None, "stdlib", OPTIONS, longest=None)
    assert calibration is None
    assert held_out is not None
    assert calibration_and_held_out(tokenizer, None, None, OPTIONS, longest=None) == (None, None)


def test_too_little_text_to_hold_any_back_is_refused(tokenizer: AutoTokenizer) -> None:
    documents = Documents("short", ("a b c d e f g h i j k l m n o p q r s t u v w x y z",))
    with pytest.raises(SkinkError, match=r"\[CALIBRATION-001\] short gives 1 window of 16 tokens: none is left"):
        calibration_and_held_out(tokenizer, documents, None, OPTIONS, longest=None)


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(SkinkError, match=r"\[CALIBRATION-002\] text was given, and there is no tokenizer"):
        calibration_and_held_out(None, "stdlib", None, OPTIONS, longest=None)


@pytest.mark.parametrize("option", ["calibration_windows", "held_out_windows", "length"])
def test_options_have_ranges(option: str) -> None:
    with pytest.raises(SkinkError, match=rf"\[OPTION-002\] {option}=0"):
        TextOptions(**{option: 0})


class Words:
    """A tokenizer of whole words between the marks 1 and 2; padding is 3, which is not what tensors begin with."""

    pad_token_id = 3
    model_max_length = 512

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(
        self, texts: list[str], *, truncation: bool, max_length: int, return_attention_mask: bool
    ) -> dict[str, list[list[int]]]:
        words = [[self.ids.setdefault(word, 4 + len(self.ids)) for word in text.split()] for text in texts]
        return {"input_ids": [[1, *row[: max_length - 2], 2] for row in words]}


def paragraphs(count: int) -> Documents:
    return Documents("notes", ("\n\n".join(" ".join(f"t{i}w{j}" for j in range(6 + i % 9)) for i in range(count)),))


def rows(texts: Any) -> set[tuple[int, ...]]:
    """Each text without its marks and padding."""
    tokens, mask = texts.tokens, texts.padding if hasattr(texts, "padding") else texts.mask
    return {tuple(row[real.bool()].tolist()[1:-1]) for row, real in zip(tokens, mask, strict=True)}


def test_an_encoder_reads_each_passage_by_itself_between_marks_and_before_padding() -> None:
    options = TextOptions(calibration_windows=8, held_out_windows=4, length=64)
    calibration, held_out = encoder_texts(Words(), paragraphs(60), None, options, longest=512)
    assert calibration is not None
    assert held_out is not None
    assert calibration.padding is not None
    for tokens, mask in ((calibration.tokens, calibration.padding), (held_out.texts.tokens, held_out.texts.mask)):
        lengths = mask.sum(1)
        assert tokens.shape == mask.shape
        assert tokens.shape[1] == int(lengths.max())
        assert (mask[:, :-1] >= mask[:, 1:]).all()
        assert (tokens[:, 0] == 1).all()
        assert (tokens[torch.arange(len(tokens)), lengths - 1] == 2).all()
        assert (tokens[mask == 0] == 3).all()
    # As many tokens as a decoder's windows would have.
    assert 0.8 < calibration.tokens.numel() / (8 * 64) <= 1
    assert held_out.queries.tokens.shape[0] == held_out.passages.tokens.shape[0]


def test_one_paragraph_in_ten_is_held_out_and_none_is_in_both() -> None:
    options = TextOptions(calibration_windows=1000, held_out_windows=1000, length=64)
    calibration, held_out = encoder_texts(Words(), paragraphs(60), None, options, longest=512)
    assert calibration is not None
    assert held_out is not None
    assert (len(calibration.tokens), len(held_out.texts.tokens)) == (54, 6)
    assert not rows(calibration) & (rows(held_out.texts) | rows(held_out.passages))
    assert "held out" in calibration.source
    assert calibration.sha256 != held_out.sha256


def test_held_out_text_that_is_also_calibrated_on_is_left_out() -> None:
    options = TextOptions(calibration_windows=1000, held_out_windows=1000, length=64)
    calibration, held_out = encoder_texts(Words(), paragraphs(40), paragraphs(60), options, longest=512)
    assert calibration is not None
    assert held_out is not None
    assert len(held_out.texts.tokens) == 20
    assert not rows(calibration) & rows(held_out.texts)
    with pytest.raises(SkinkError, match=r"\[CALIBRATION-001\] notes gives no text to judge on"):
        encoder_texts(Words(), paragraphs(60), paragraphs(60), options, longest=512)


def test_an_encoder_is_judged_on_docstrings_of_other_files() -> None:
    options = TextOptions(calibration_windows=2, held_out_windows=2, length=128)
    calibration, held_out = encoder_texts(Words(), "stdlib", None, options, longest=512)
    assert calibration is not None
    assert held_out is not None
    assert "calibration" in calibration.source
    assert "held-out" in held_out.source
    assert not rows(calibration) & rows(held_out.texts)


def test_texts_fit_what_the_encoder_reads() -> None:
    options = TextOptions(calibration_windows=8, held_out_windows=4, length=64)
    windows = calibration_windows(Words(), paragraphs(60), options, longest=9, encoder=True)
    assert windows.tokens.shape[1] == 9
    encoder = SimpleNamespace(can_generate=lambda: False, config=SimpleNamespace(max_position_embeddings=514))
    assert longest_text(encoder, Words()) == 512
    assert longest_text(encoder, Words(), 256) == 256
    assert longest_text(encoder, None) == 514
    decoder = SimpleNamespace(can_generate=lambda: True, config=SimpleNamespace(max_position_embeddings=514))
    assert longest_text(decoder, Words()) == 514


def test_text_for_an_encoder_needs_a_tokenizer_and_words() -> None:
    options = TextOptions(calibration_windows=8, held_out_windows=4, length=64)
    with pytest.raises(SkinkError, match=r"\[CALIBRATION-002\] text was given, and there is no tokenizer"):
        encoder_texts(None, "stdlib", None, options, longest=None)
    with pytest.raises(SkinkError, match=r"\[CALIBRATION-001\] few gives no text to judge on"):
        encoder_texts(
            Words(), Documents("x", ("one two three four five six",)), Documents("few", ("a b",)), options, longest=None
        )
    assert encoder_texts(Words(), None, None, options, longest=None) == (None, None)


def test_a_model_knows_as_many_tokens_as_its_table_has_rows() -> None:
    class Hidden:
        def get_input_embeddings(self) -> Any:
            raise NotImplementedError

    assert known_tokens(SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(7, 2))) == 7
    assert known_tokens(Hidden()) is None
