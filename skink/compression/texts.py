"""Which text a model is calibrated on, and which other text it is judged on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from skink.errors import CalibrationError, check_range
from skink.evaluation import Documents, Tokenizer, standard_library, text_files, token_windows
from skink.evaluation.corpus import cut_windows, token_stream

STANDARD_LIBRARY = "stdlib"

# Of user text without a held-out part of its own, one window in so many is kept back to judge on.
_HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class TextOptions:
    """How text is cut.

    Args:
        calibration_windows: windows of calibration text, >= 1.
        held_out_windows: windows of held-out text, >= 1.
        length: tokens in a window, >= 2; shortened to what the model's positions allow.
    """

    calibration_windows: int = 128
    held_out_windows: int = 64
    length: int = 512

    def __post_init__(self) -> None:
        check_range("calibration_windows", self.calibration_windows, low=1, high=1e9)
        check_range("held_out_windows", self.held_out_windows, low=1, high=1e9)
        check_range("length", self.length, low=2, high=1e9)


@dataclass(frozen=True)
class Windows:
    """Token windows int64[N, length] and where they came from."""

    tokens: Tensor
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
    if _is_standard_library(text):
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
    if tokenizer is None:
        raise CalibrationError(
            "CALIBRATION-002",
            "text was given, and there is no tokenizer to read it with.",
            fix="put tokenizer.json beside the checkpoint; in Python pass tokenizer=, or token windows as a tensor.",
        )
    length = min(options.length, longest) if longest else options.length
    if calibration is None:
        return None, _held_out(tokenizer, held_out, options, length) if held_out is not None else None
    documents = read_documents(calibration)
    if held_out is None and _is_standard_library(calibration):
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


def _held_out(tokenizer: Tokenizer, text: TextLike, options: TextOptions, length: int) -> Windows:
    documents = read_documents(text, split="held-out")
    tokens = token_windows(documents, tokenizer, length=length, count=options.held_out_windows)
    return Windows(tokens, documents.name, documents.sha256)


def _is_standard_library(text: TextLike) -> bool:
    if isinstance(text, Documents | Path):
        return False
    return text == STANDARD_LIBRARY if isinstance(text, str) else list(text) == [STANDARD_LIBRARY]


def _spread(windows: Tensor, count: int) -> Tensor:
    """`count` of the windows, evenly spaced, or all where there are fewer."""
    if windows.shape[0] <= count:
        return windows
    return windows[torch.linspace(0, windows.shape[0] - 1, count).long()]
