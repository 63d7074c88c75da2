"""All text that one compression reads: to calibrate on, to train on, and to judge on, none of it in two places that
must not meet."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skink.compression.text_options import TextOptions, TrainingTextOptions
from skink.compression.texts import (
    STANDARD_LIBRARY,
    HeldOutTexts,
    TextLike,
    calibration_and_held_out,
    encoder_texts,
    is_standard_library,
)
from skink.compression.training_texts import training_windows
from skink.errors import RecoveryError
from skink.evaluation import Documents
from skink.graph.windows import Windows

# Of text to train on that is all there is, one window in so many is kept back to judge on.
_HELD_OUT_EVERY = 10
_ALL = 10**9
_AS_USUAL = TrainingTextOptions()


@dataclass(frozen=True)
class ChosenTexts:
    """What a compression reads.

    Args:
        calibration: what passes measure on.
        held_out: what the result is judged on.
        training: what passes train on; None where none of them does.
    """

    calibration: Windows | None
    held_out: Windows | HeldOutTexts | None
    training: Windows | None = None

    @property
    def judged(self) -> Windows | None:
        """The held-out text as windows, for passes that train."""
        if isinstance(self.held_out, HeldOutTexts):
            texts = self.held_out.texts
            return Windows(texts.tokens, self.held_out.source, self.held_out.sha256, texts.mask)
        return self.held_out


def training_text(training: Any, calibration: Any, *, ships: bool) -> Any:
    """What there is to train on: what the user named, else the text to calibrate on; None where it is none.

    Args:
        training: as the user gave it, or None.
        calibration: text, or token windows, of which a model would learn too little.
        ships: whether the model is the one that ships, whose text is the standard library.
    """
    if training is not None:
        return training
    if calibration is None:
        return STANDARD_LIBRARY if ships else None
    return calibration if isinstance(calibration, str | Path | Documents | Sequence) else None


def check_apart(training: Any, held_out: Any) -> None:
    """Refuse files to train on that the model is judged by too. What files hold is compared before training begins.

    Raises:
        RecoveryError: RECOVER-002.
    """
    paths = [
        _listed(text) if _is_text(text) and not isinstance(text, Documents) else [] for text in (training, held_out)
    ]
    # Its two parts are told apart by who asks.
    both = [path for path in paths[0] if path in paths[1] and path != STANDARD_LIBRARY]
    if both:
        raise RecoveryError(
            "RECOVER-002",
            f"{both[0]!r} is text to train on and held-out text in one: the model would be judged by what it learnt.",
            fix="name other files to judge by, or none: then a tenth of the text is kept back.",
        )


def choose_texts(
    tokenizer: Any,
    *,
    calibration: TextLike | None,
    held_out: TextLike | Windows | Tensor | None,
    training: Any,
    options: TextOptions,
    tokens: int,
    training_texts: TrainingTextOptions = _AS_USUAL,
    longest: int | None,
    vocabulary: int | None = None,
    encoder: bool,
) -> ChosenTexts:
    """The windows of each text.

    What is judged on is never trained on: where nothing else is named, it is one window in ten of the text that is
    calibrated on, or, where there is none, trained on, and neither sees it.

    Args:
        tokenizer: the model's own; None where it has none.
        calibration: text to calibrate on.
        held_out: text to judge on; or token windows, which are taken as they are.
        training: text to train on: whatever `training_windows` takes.
        options: how text is cut.
        tokens: how much is trained on; 0 for nothing.
        training_texts: how that is read and cut.
        longest: tokens that the model takes.
        vocabulary: ids that it knows; None: as many as the tokenizer does.
        encoder: whether the model reads each text by itself.

    Raises:
        CalibrationError: CALIBRATION-001, -002.
        RecoveryError: RECOVER-008 where nothing can be trained on.
        OptionError: OPTION-002 where `training_texts` says what cannot be done with this text.
    """
    wanted = training if tokens else None
    check_apart(wanted, held_out)
    given = Windows(held_out, "tokens") if isinstance(held_out, Tensor) else held_out
    # Text that is not windows yet.
    other = None if isinstance(given, Windows) else given
    if encoder:
        chosen = _for_an_encoder(tokenizer, calibration, other, wanted, options, training_texts, tokens, longest)
        return replace(chosen, held_out=given) if isinstance(given, Windows) else chosen
    found, judged = calibration_and_held_out(tokenizer, calibration, other, options, longest=longest)
    judged = given if isinstance(given, Windows) else judged
    if wanted is None:
        return ChosenTexts(found, judged)
    length = training_texts.length or options.length
    length = min(length, longest) if longest else length
    if held_out is None and calibration is not None and _same(wanted, calibration) and not _ships(calibration):
        training_texts.refuse("packing", "field", "dtype", why="it is calibrated on too, and read for that")
        # All that was not held back, end to end, in windows of the length to train on.
        kept, _ = calibration_and_held_out(
            tokenizer, calibration, None, replace(options, calibration_windows=_ALL), longest=longest
        )
        if kept is not None:
            return ChosenTexts(found, judged, _cut_again(kept, length))
    if judged is None and _ships(wanted):
        _, judged = calibration_and_held_out(tokenizer, None, wanted, options, longest=longest)
    read = training_windows(
        tokenizer,
        wanted,
        length=length,
        tokens=tokens if judged is not None else tokens * _HELD_OUT_EVERY // (_HELD_OUT_EVERY - 1),
        longest=longest,
        packing=training_texts.packing,
        field=training_texts.field,
        dtype=training_texts.dtype,
        vocabulary=vocabulary,
    )
    if judged is not None:
        return ChosenTexts(found, judged, read)
    return ChosenTexts(found, *_held_back(read, options.held_out_windows))


def _for_an_encoder(
    tokenizer: Any,
    calibration: TextLike | None,
    held_out: TextLike | None,
    training: Any,
    options: TextOptions,
    training_texts: TrainingTextOptions,
    tokens: int,
    longest: int | None,
) -> ChosenTexts:
    found, judged = encoder_texts(tokenizer, calibration, held_out, options, longest=longest)
    if training is None:
        return ChosenTexts(found, judged)
    training_texts.refuse("packing", "field", "dtype", why="an encoder reads each passage by itself")
    if isinstance(training, Windows):
        return ChosenTexts(found, judged, training)
    if not _is_text(training):
        raise RecoveryError(
            "RECOVER-008",
            f"an encoder trains on text, and a {type(training).__name__} was given.",
            why="it reads each passage by itself, with the marks that its tokenizer puts around it.",
            fix="give files, folders, the word stdlib, or windows with padding as skink.graph.windows.Windows.",
        )
    length = training_texts.length or options.length
    # One passage in ten is kept back of the same text in the same way.
    many = replace(options, calibration_windows=max(1, tokens // length), length=length)
    kept, others = encoder_texts(tokenizer, training, held_out, many, longest=longest)
    return ChosenTexts(found, judged if calibration is not None or held_out is not None else others, kept)


def _is_text(text: Any) -> bool:
    if isinstance(text, str | Path | Documents):
        return True
    return isinstance(text, list | tuple) and all(isinstance(entry, str | Path) for entry in text)


def _same(one: Any, other: Any) -> bool:
    return _is_text(one) and _is_text(other) and _listed(one) == _listed(other)


def _ships(text: Any) -> bool:
    return _is_text(text) and is_standard_library(text)


def _listed(text: Any) -> list[Any]:
    if isinstance(text, Documents):
        return [text]
    entries = [text] if isinstance(text, str | Path) else list(text)
    return [str(entry) for entry in entries]


def _cut_again(text: Windows, length: int) -> Windows:
    """The same tokens, end to end, in windows of another length."""
    flat = text.tokens.reshape(-1)
    length = min(length, len(flat))
    return replace(text, tokens=flat[: len(flat) // length * length].reshape(-1, length))


def _held_back(text: Windows, most: int) -> tuple[Windows | None, Windows]:
    """(one window in ten, at most so many; the others)."""
    count = text.tokens.shape[0]
    if count < 2:
        return None, text
    places = torch.arange(count)[min(_HELD_OUT_EVERY, count) - 1 :: _HELD_OUT_EVERY]
    back = torch.zeros(count, dtype=torch.bool)
    back[places] = True
    judged = places[torch.linspace(0, len(places) - 1, min(most, len(places))).long()]
    name = f"{text.source}, 1 window in {_HELD_OUT_EVERY} held out"

    def chosen(which: Tensor) -> Windows:
        padding = None if text.padding is None else text.padding[which]
        return Windows(text.tokens[which], name, text.sha256, padding)

    return chosen(judged), chosen((~back).nonzero().flatten())
