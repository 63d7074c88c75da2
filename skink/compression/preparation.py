"""What a compression on disk begins with: the model, its tokenizer, all text, and a teacher where one is named."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skink.compression.chosen_texts import ChosenTexts, check_apart, choose_texts, training_text
from skink.compression.compress import Progress, canonical_program
from skink.compression.texts import STANDARD_LIBRARY, known_tokens, longest_text
from skink.compression.training_texts import check_readable
from skink.errors import OutputError
from skink.export.huggingface import load_source
from skink.export.huggingface.loading import STDLIB_LLAMA, holds_encoder, stored_dtype
from skink.export.huggingface.sentences import SentenceSettings, sentence_settings
from skink.graph.pipeline import check_training_text
from skink.graph.program import Program
from skink.passes.recipe import Recipe
from skink.passes.recover.asked import check_asked
from skink.settings import settings

if TYPE_CHECKING:
    from skink.compression.folder import CompressOptions


@dataclass(frozen=True)
class Prepared:
    """What a compression works on.

    Args:
        source: the model.
        tokenizer: the model's; None where there is none.
        stored: dtype of the weights in the checkpoint.
        encoder: whether the model is one.
        sentences: how an encoder's checkpoint makes embeddings.
        texts: all text that is read.
        teacher: in canonical form; None: the model itself.
    """

    source: Any
    tokenizer: Any
    stored: torch.dtype
    encoder: bool
    sentences: SentenceSettings
    texts: ChosenTexts
    teacher: Program | None


def check_texts(name: str, recipe: Recipe, options: "CompressOptions") -> None:
    """Refuse what can be seen to be wrong before anything is loaded: a recipe that trains where there is no text for
    it, or the text that it is judged by, or files that are not there; what is said of training where nothing trains; a
    teacher that nobody learns from; checkpoints that have no folder.

    Raises:
        RecoveryError: RECOVER-002, -005, -008, -009.
        InputError: INPUT-001.
        OptionError: OPTION-002.
        OutputError: OUTPUT-002.
    """
    text = training_text(options.training, options.calibration, ships=name == STDLIB_LLAMA)
    passes = recipe.everything
    check_asked(
        passes,
        text=options.training is not None,
        cut=options.training_texts.said,
        checkpoints=options.checkpoints is not None,
        teacher=options.teacher is not None,
    )
    check_training_text(passes, given=text is not None)
    if any(entry.training_tokens(2) for entry in passes):
        check_apart(text, options.held_out)
        check_readable(text, options.training_texts)
        _check_checkpoints(options.checkpoints)


def _check_checkpoints(folder: Path | None) -> None:
    """Refuse a place where no folder can be; the passes before training may take hours."""
    if folder is None:
        return
    there = next(place for place in (folder, *folder.parents) if place.exists() or place == place.parent)
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "you may not write there" if there.is_dir() else f"{there} is a file"
        raise OutputError(
            "OUTPUT-002", f"cannot keep checkpoints in {folder}: {why}.", fix="name a folder that you may write to."
        )


def prepare(name: str, recipe: Recipe, options: "CompressOptions", progress: Progress) -> Prepared:
    """Load the model, cut all text, and load the teacher.

    Args:
        name: see `compress_to_folder`.
        recipe: says how much text is trained on.
        options: see `CompressOptions`.
        progress: called as (what, done, total).

    Raises:
        SkinkError: see docs/errors.md.
    """
    ships = name == STDLIB_LLAMA
    calibration = STANDARD_LIBRARY if options.calibration is None and ships else options.calibration
    progress("load", 0, 1)
    encoder = holds_encoder(name)
    device = options.device
    if device == "cuda" and settings().processes > 1:
        device = f"cuda:{settings().local_process}"
    source, tokenizer = load_source(name, dtype=options.dtype, device=device, encoders=encoder)
    stored = stored_dtype(name)
    sentences = sentence_settings(name) if encoder else SentenceSettings()
    progress("load", 1, 1)
    length = options.training_texts.length or options.texts.length
    texts = choose_texts(
        tokenizer,
        calibration=calibration,
        held_out=options.held_out,
        training=training_text(options.training, options.calibration, ships=ships),
        options=options.texts,
        tokens=max((entry.training_tokens(length) for entry in recipe.everything), default=0),
        training_texts=options.training_texts,
        longest=longest_text(source, tokenizer, sentences.longest),
        vocabulary=known_tokens(source),
        encoder=encoder,
    )
    teacher: Program | None = None
    if options.teacher is not None:
        progress("load the teacher", 0, 1)
        model, _ = load_source(options.teacher, dtype=options.dtype, device=device, encoders=encoder)
        teacher = canonical_program(model, seed=options.seed)
        progress("load the teacher", 1, 1)
    return Prepared(source, tokenizer, stored, encoder, sentences, texts, teacher)
