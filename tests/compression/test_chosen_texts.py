"""Which text is calibrated on, trained on, and judged on: never the same where that matters."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from skink.compression import TextOptions, TrainingTextOptions
from skink.compression.chosen_texts import ChosenTexts, choose_texts, training_text
from skink.compression.texts import HeldOutTexts
from skink.errors import OptionError, RecoveryError
from skink.evaluation import Documents
from skink.evaluation.embeddings import Texts
from skink.export.huggingface.loading import load_source
from skink.graph.windows import Windows
from skink.training.overlap import check_overlap

TEXT = Documents("numbers", (" ".join(str(number) for number in range(4000)),))
OTHER = Documents("others", (" ".join(str(number) for number in range(9000, 12000)),))
OPTIONS = TextOptions(calibration_windows=4, held_out_windows=3, length=32)


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return load_source("stdlib-llama")[1]


def choose(tokenizer: object, **changes: object) -> ChosenTexts:
    given: dict[str, object] = {"calibration": None, "held_out": None, "training": None, "tokens": 2000}
    given |= {"options": OPTIONS, "longest": 512, "encoder": False} | changes
    return choose_texts(tokenizer, **given)  # type: ignore[arg-type]


def rows(windows: Windows) -> set[tuple[int, ...]]:
    return {tuple(row) for row in windows.tokens.tolist()}


def test_text_to_calibrate_on_serves_for_training_but_for_what_is_judged(tokenizer: object) -> None:
    found = choose(tokenizer, calibration=TEXT, training=TEXT)
    assert found.training is not None
    assert isinstance(found.held_out, Windows)
    assert found.judged is found.held_out
    assert len(found.training.tokens) > 4 * len(found.calibration.tokens)  # all of it, not what calibration takes
    assert not rows(found.training) & rows(found.held_out)
    assert check_overlap(found.training, found.held_out, span=16) < 0.05


def test_windows_to_train_on_may_have_a_length_of_their_own(tokenizer: object) -> None:
    longer = TrainingTextOptions(length=48)
    found = choose(tokenizer, calibration=TEXT, training=TEXT, training_texts=longer)
    assert found.training.tokens.shape[1] == 48
    assert found.held_out.tokens.shape[1] == 32
    other = choose(tokenizer, calibration=TEXT, training=OTHER, training_texts=longer, longest=40)
    assert other.training.tokens.shape[1] == 40


def test_without_other_text_a_tenth_of_the_training_text_is_judged_on(tokenizer: object) -> None:
    found = choose(tokenizer, training=TEXT)
    assert found.calibration is None
    assert found.held_out.tokens.shape == (3, 32)
    assert found.training.tokens.numel() >= 2000
    assert "held out" in found.training.source
    assert not rows(found.training) & rows(found.held_out)


def test_what_is_named_is_taken(tokenizer: object) -> None:
    found = choose(tokenizer, training=TEXT, held_out=OTHER)
    assert found.training.source == "numbers"
    assert found.held_out.source == "others"
    assert 2000 <= found.training.tokens.numel() < 2000 + 32


def test_the_standard_library_has_a_part_to_judge_on(tokenizer: object) -> None:
    found = choose(tokenizer, training="stdlib", calibration=None)
    assert "held-out" in found.held_out.source
    assert "not held out" in found.training.source


def test_windows_to_judge_on_are_taken_as_they_are() -> None:
    tokens, judged = torch.arange(640).reshape(20, 32), torch.arange(9000, 9064).reshape(2, 32)
    for given in (judged, Windows(judged, "mine")):
        found = choose(None, training=tokens, tokens=640, held_out=given)
        assert found.judged is not None
        assert torch.equal(found.judged.tokens, judged)
        # Nothing else is kept back.
        assert torch.equal(found.training.tokens, tokens)


def test_where_nothing_trains_nothing_is_read(tokenizer: object) -> None:
    assert choose(tokenizer, training=TEXT, tokens=0) == ChosenTexts(None, None)


@pytest.mark.parametrize(("count", "judged"), [(1, 0), (2, 1), (9, 1), (20, 2)])
def test_of_a_very_short_text_one_window_is_judged_on_where_there_are_two(count: int, judged: int) -> None:
    tokens = torch.arange(count * 32).reshape(count, 32)
    found = choose(None, training=tokens, tokens=count * 32)
    assert (0 if found.held_out is None else len(found.held_out.tokens)) == judged
    assert len(found.training.tokens) == count - judged


def test_padding_goes_with_its_windows() -> None:
    given = Windows(torch.arange(640).reshape(20, 32), "mine", "", torch.arange(640).reshape(20, 32) % 5)
    found = choose(None, training=given, tokens=64)
    assert found.held_out.tokens.shape[0] == 2
    for part in (found.training, found.held_out):
        assert torch.equal(part.padding, part.tokens % 5)


@pytest.mark.parametrize(
    ("training", "calibration", "ships", "found"),
    [
        ("a", "b", True, "a"),
        (None, "b", True, "b"),
        (None, None, True, "stdlib"),
        (None, None, False, None),
        (None, torch.zeros(2, 2), True, None),
        (None, Path("b"), False, Path("b")),
        (None, ["b", "c"], False, ["b", "c"]),
        (None, TEXT, False, TEXT),
    ],
)
def test_what_there_is_to_train_on(training: object, calibration: object, ships: bool, found: object) -> None:
    assert training_text(training, calibration, ships=ships) == found


def test_an_encoders_texts_are_judged_as_windows() -> None:
    texts = Texts(torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 0], [1, 1, 1]]))
    found = ChosenTexts(None, HeldOutTexts(texts, texts, texts, "passages", "12"))
    assert found.judged == Windows(texts.tokens, "passages", "12", texts.mask)


def test_an_encoder_trains_on_text_or_on_windows() -> None:
    given = Windows(torch.ones(2, 3, dtype=torch.int64))
    assert choose(None, training=given, encoder=True).training is given
    with pytest.raises(RecoveryError, match=r"\[RECOVER-008\] an encoder trains on text, and a Tensor was given."):
        choose(None, training=given.tokens, encoder=True)


def test_an_encoder_is_judged_by_passages_that_it_does_not_train_on(tokenizer: object) -> None:
    words = "\n\n".join(" ".join(str((7 * i + j * j) % 200) for j in range(12)) for i in range(200))
    text = Documents("numbers", (words,))
    found = choose(tokenizer, training=text, encoder=True, options=replace(OPTIONS, length=64))
    assert found.training.padding is not None
    assert not rows(found.training) & rows(found.judged)


def test_an_encoder_trains_on_texts_of_the_length_that_was_asked_for(tokenizer: object) -> None:
    words = "\n\n".join(" ".join(str((7 * i + j * j) % 200) for j in range(60)) for i in range(200))
    given = {"training": Documents("numbers", (words,)), "encoder": True, "options": replace(OPTIONS, length=64)}
    assert choose(tokenizer, **given).training.tokens.shape[1] == 64
    assert choose(tokenizer, **given, training_texts=TrainingTextOptions(length=24)).training.tokens.shape[1] == 24


def test_rows_in_a_field_of_another_name_are_read(tokenizer: object, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"answer": f"x = {number}\n"}) + "\n" for number in range(200)))
    options = TrainingTextOptions(packing="document", field="answer")
    found = choose(tokenizer, training=file, training_texts=options, held_out=OTHER)
    assert found.training.padding is not None
    assert found.training.source == "rows.jsonl"


@pytest.mark.parametrize("option", [{"packing": "document"}, {"field": "answer"}, {"dtype": "uint16"}])
@pytest.mark.parametrize("changes", [{"calibration": TEXT, "training": TEXT}, {"training": TEXT, "encoder": True}])
def test_what_would_change_nothing_about_the_text_is_refused(
    tokenizer: object, option: dict[str, str], changes: dict[str, object]
) -> None:
    with pytest.raises(OptionError, match=rf"\[OPTION-002\] training {next(iter(option))}='.*' does not go with this"):
        choose(tokenizer, **changes, training_texts=TrainingTextOptions(**option))
