"""Which text a model is calibrated on, and which other text it is judged on."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skink.compression.text_options import TextOptions
from skink.errors import CalibrationError
from skink.evaluation import Documents, Tokenizer, standard_library, text_files, token_windows
from skink.evaluation.corpus import cut_windows, token_stream
from skink.evaluation.embeddings import Texts
from skink.evaluation.passages import passages, query_pairs, text_units
from skink.graph.windows import Windows

STANDARD_LIBRARY = "stdlib"

# Of user text without a held-out part of its own, one window in so many is kept back to judge on.
_HELD_OUT_EVERY = 10

# An encoder's windows are as wide as the longest text: with many texts, no less than this.
_LEAST_TOKENS = 16


@dataclass(frozen=True)
class HeldOutTexts:
    """What an encoder is judged on.

    Args:
        texts: to embed.
        queries: each answered by the passage in the same place.
        passages: to be found.
        source: where they came from.
        sha256: of the texts, queries and passages.
    """

    texts: Texts
    queries: Texts
    passages: Texts
    source: str
    sha256: str


TextLike = str | Path | Documents | Sequence[str | Path]


def read_documents(text: TextLike, *, split: str = "calibration") -> Documents:
    """Documents from what the user named: the word `stdlib`, files and folders, or documents.

    Raises:
        InputError: INPUT-001.
        CalibrationError: CALIBRATION-001.
    """
    if isinstance(text, Documents):
        return text
    if is_standard_library(text):
        return standard_library("held-out" if split == "held-out" else "calibration")
    paths = [text] if isinstance(text, str | Path) else list(text)
    return text_files([Path(path) for path in paths])


def calibration_and_held_out(
    tokenizer: Tokenizer | None,
    calibration: TextLike | None,
    held_out: TextLike | None,
    options: TextOptions,
    *,
    longest: int | None,
) -> tuple[Windows | None, Windows | None]:
    """Windows to calibrate on and windows to judge on, which never overlap.

    Where only calibration text is given, one window in ten of it is kept back. The standard library has a held-out
    split of its own.

    Raises:
        CalibrationError: CALIBRATION-001 too little text; -002 text without a tokenizer to read it with.
    """
    if calibration is None and held_out is None:
        return None, None
    tokenizer = _needed(tokenizer)
    length = min(options.length, longest) if longest else options.length
    if calibration is None:
        return None, _held_out(tokenizer, held_out, options, length) if held_out is not None else None
    documents = read_documents(calibration)
    if held_out is None and is_standard_library(calibration):
        held_out = STANDARD_LIBRARY
    if held_out is not None:
        tokens = token_windows(documents, tokenizer, length=length, count=options.calibration_windows, over="sample")
        return Windows(tokens, documents.name, documents.sha256), _held_out(tokenizer, held_out, options, length)
    everything = cut_windows(token_stream(documents, tokenizer), length=length, count=None, name=documents.name)
    if everything.shape[0] < 2:
        raise CalibrationError(
            "CALIBRATION-001",
            f"{documents.name} gives {everything.shape[0]} window of {length} tokens: none is left to judge on.",
            fix="give more text, a smaller length, or --held-out FILES.",
        )
    back = torch.zeros(everything.shape[0], dtype=torch.bool)
    back[min(_HELD_OUT_EVERY, everything.shape[0]) - 1 :: _HELD_OUT_EVERY] = True
    kept, judged = everything[~back], everything[back]
    name = f"{documents.name}, 1 window in {_HELD_OUT_EVERY} held out"
    return (
        Windows(_spread(kept, options.calibration_windows), name, documents.sha256),
        Windows(_spread(judged, options.held_out_windows), name, documents.sha256),
    )


def calibration_windows(
    tokenizer: Any, calibration: TextLike, options: TextOptions, *, longest: int | None, encoder: bool
) -> Windows:
    """What a model is calibrated on, where nothing is judged; arguments and errors as of the functions beside it."""
    read = encoder_texts if encoder else calibration_and_held_out
    windows, _ = read(tokenizer, calibration, None, options, longest=longest)
    if windows is None:
        raise _too_little("the text", "calibrate on")
    return windows


def encoder_texts(
    tokenizer: Any,
    calibration: TextLike | None,
    held_out: TextLike | None,
    options: TextOptions,
    *,
    longest: int | None,
) -> tuple[Windows | None, HeldOutTexts | None]:
    """Passages to calibrate an encoder on and texts to judge it on, none of them in both.

    An encoder reads each text by itself: so a window is one passage with the marks that the tokenizer puts around it,
    and padding behind it. There are as many as fill the same number of tokens, padding too, as a decoder's windows:
    `options.calibration_windows` times the length. Where only calibration text is given, one unit in ten of it (a
    docstring, a comment, a paragraph) is kept back.

    Args:
        tokenizer: the model's own, of transformers.
        calibration: text, as in `read_documents`.
        held_out: text to judge on.
        options: how much of it.
        longest: most tokens that the model, or its tokenizer, takes.

    Raises:
        CalibrationError: CALIBRATION-001 too little text; -002 text without a tokenizer to read it with.
    """
    if calibration is None and held_out is None:
        return None, None
    _needed(tokenizer)
    length = min(options.length, longest) if longest else options.length
    room, judged_room = options.calibration_windows * options.length, options.held_out_windows * options.length
    if calibration is None:
        documents = read_documents(held_out or (), split="held-out")
        return None, _to_judge(tokenizer, text_units(documents), documents.name, judged_room, length)
    documents = read_documents(calibration)
    if held_out is None and is_standard_library(calibration):
        held_out = STANDARD_LIBRARY
    name = documents.name
    if held_out is not None:
        other = read_documents(held_out, split="held-out")
        units = text_units(documents, enough=room // _LEAST_TOKENS)
        judged, judged_name = text_units(other), other.name
    else:
        everything = text_units(documents)
        back = set(everything[min(_HELD_OUT_EVERY, len(everything)) - 1 :: _HELD_OUT_EVERY])
        units, judged = [unit for unit in everything if unit not in back], [unit for unit in everything if unit in back]
        name = judged_name = f"{name}, 1 unit in {_HELD_OUT_EVERY} held out"
    chosen = passages(units)
    if not chosen:
        raise _too_little(name, "calibrate on")
    tokens = _fill(tokenizer, [chosen], room, length)[0]
    seen = {*units, *chosen}
    kept = _to_judge(tokenizer, [unit for unit in judged if unit not in seen], judged_name, judged_room, length, seen)
    return Windows(tokens.tokens, name, documents.sha256, tokens.mask), kept


def longest_text(model: Any, tokenizer: Any, advised: int | None = None) -> int | None:
    """Tokens of the longest text that a model reads; None where nothing says.

    Args:
        model: with its configuration.
        tokenizer: which knows better where an encoder's first positions are taken; or None.
        advised: by the model's maker, for embeddings.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    known = positions if model.can_generate() else getattr(tokenizer, "model_max_length", None)
    return min((size for size in (positions, known, advised) if isinstance(size, int)), default=None)


def known_tokens(model: Any) -> int | None:
    """Ids of tokens that a model knows, as rows of its table; None where it shows none."""
    try:
        table = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:
        # What transformers raises for a model whose table has another name.
        return None
    return None if table is None else int(table.shape[0])


def _to_judge(
    tokenizer: Any, units: list[str], name: str, room: int, length: int, seen: set[str] | None = None
) -> HeldOutTexts:
    """Texts, queries and passages from units that calibration did not see."""
    texts = [text for text in passages(units) if text not in (seen or ())]
    queries, answers = query_pairs(units)
    if not texts or not answers:
        raise _too_little(name, "judge on")
    asked, found = _fill(tokenizer, [queries, answers], room, length)
    digest = sha256("\0".join([*texts, *queries, *answers]).encode("utf-8", "surrogatepass")).hexdigest()
    return HeldOutTexts(_fill(tokenizer, [texts], room, length)[0], asked, found, name, digest)


def _fill(tokenizer: Any, lists: list[list[str]], room: int, length: int) -> list[Texts]:
    """As many texts of each of some equally long lists as fit, with their padding, in `room` tokens for each list.

    One text in fifty is cut short, so that a few long ones do not fill the windows of all others with padding.
    """
    counted = [_tokens(tokenizer, _evenly(texts, max(1, room // _LEAST_TOKENS)), length).mask.sum(1) for texts in lists]
    widths = [max(1, int(lengths.double().quantile(0.98))) for lengths in counted]
    count = max(1, min(room // width for width in widths))
    return [_tokens(tokenizer, _evenly(texts, count), width) for texts, width in zip(lists, widths, strict=True)]


def _tokens(tokenizer: Any, texts: list[str], length: int) -> Texts:
    """Texts with the marks that the tokenizer puts around each, padded behind to the longest."""
    rows = tokenizer(texts, truncation=True, max_length=length, return_attention_mask=False)["input_ids"]
    padding = getattr(tokenizer, "pad_token_id", None) or 0
    width = max(1, *(len(row) for row in rows))
    tokens = torch.full((len(rows), width), padding, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, : len(row)] = 1
    return Texts(tokens, mask)


def _evenly(texts: list[str], count: int) -> list[str]:
    """`count` of the texts, evenly spaced, or all where there are fewer."""
    count = min(count, len(texts))
    return [texts[index * len(texts) // count] for index in range(count)]


def _too_little(name: str, purpose: str) -> CalibrationError:
    return CalibrationError(
        "CALIBRATION-001",
        f"{name} gives no text to {purpose}.",
        why="texts for an encoder are docstrings, comments or paragraphs of six words and more.",
        fix="give more text, or --held-out FILES.",
    )


def _needed(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise CalibrationError(
            "CALIBRATION-002",
            "text was given, and there is no tokenizer to read it with.",
            fix="put tokenizer.json beside the checkpoint; in Python pass tokenizer=, or token windows as a tensor.",
        )
    return tokenizer


def _held_out(tokenizer: Tokenizer, text: TextLike, options: TextOptions, length: int) -> Windows:
    documents = read_documents(text, split="held-out")
    tokens = token_windows(documents, tokenizer, length=length, count=options.held_out_windows)
    return Windows(tokens, documents.name, documents.sha256)


def is_standard_library(text: TextLike) -> bool:
    """Whether text is named by the word for the standard library, which has a part of its own to judge on."""
    if isinstance(text, Documents | Path):
        return False
    return text == STANDARD_LIBRARY if isinstance(text, str) else list(text) == [STANDARD_LIBRARY]


def _spread(windows: Tensor, count: int) -> Tensor:
    """`count` of the windows, evenly spaced, or all where there are fewer."""
    if windows.shape[0] <= count:
        return windows
    return windows[torch.linspace(0, windows.shape[0] - 1, count).long()]
