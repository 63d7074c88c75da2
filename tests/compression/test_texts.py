"""Calibration and held-out text: where it comes from, and that the two never overlap."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from skink.compression.texts import TextOptions, calibration_and_held_out
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
