"""Text to train on, in windows of tokens, from every form in which people have it.

Documents are packed one after another between the tokenizer's begin and end tokens and cut into windows (GPT-3, Brown
et al. 2020, arXiv 2005.14165, appendix B), or each stands in a row of its own. The order is that of the seed, so that a
part of the text is a fair sample of it. Equal arguments give equal windows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from skink.compression.text_options import Packing, TrainingTextOptions
from skink.compression.text_pieces import (
    LINES,
    DatasetShelf,
    DocumentShelf,
    Integers,
    Piece,
    Shelf,
    file_shelves,
    rows,
    shuffled,
)
from skink.compression.texts import is_standard_library
from skink.compression.token_arrays import BINARY, SUFFIXES, array_windows, checked, read_tokens, too_little, unusable
from skink.errors import CalibrationError, check_range
from skink.evaluation.corpus import Documents, standard_library
from skink.graph.windows import Windows

# A path or the word `stdlib`, several of them, Documents, windows, tokens, a data set, or an iterable of texts or rows.
TrainingText = str | Path | Sequence[str | Path] | Documents | Windows | Tensor | npt.NDArray[Any] | Iterable[Any]

_BATCH = 1 << 18  # characters tokenised at once
_MANY = 256  # pieces tokenised at once


def training_windows(
    tokenizer: Any,
    text: TrainingText,
    *,
    length: int,
    tokens: int | None = None,
    longest: int | None = None,
    packing: Packing = "stream",
    seed: int = 0,
    field: str | None = None,
    dtype: str | None = None,
    vocabulary: int | None = None,
) -> Windows:
    """Windows int64[N, length] of training text; with packing="document" int64[N, T] with T up to `length`.

    Args:
        tokenizer: of transformers; None does for text that is tokens already.
        text: one of

            - the word `stdlib`: the standard library's files that are not held out;
            - a text file, a .jsonl file (a document a line), a folder of them, or a list of such paths;
            - `Documents`;
            - a data set of Hugging Face `datasets`, streaming or not, or a dictionary of splits (its "train");
            - any other iterable of texts, of rows (mappings), or of lists of token ids; not a list of strings, which
              are paths;
            - token ids, integers [N] or [N, T]: a tensor, an array, a .npy file, or a .bin file (see `dtype`);
            - `Windows`, taken as they are.
        length: tokens in a window, at least 2; shortened to `longest`. Tokens [N, T] keep their T.
        tokens: how much is taken, rounded up to whole windows; None: all. No more is read than that needs.
        longest: most tokens that the model reads.
        packing: `stream` packs documents one after another; `document` puts each in a row, cut to `length` and padded
            behind.
        seed: of the order of documents, and of which windows of an array are taken. What can only be read from its
            beginning is read in its own order.
        field: of the rows that holds the text or the token ids; None: "text", or else "input_ids".
        dtype: of the integers in a .bin file: uint16, uint32, int32 or int64.
        vocabulary: ids that the model knows; None: as many as the tokenizer does.

    Raises:
        RecoveryError: RECOVER-008 for text that cannot be used: too little, no text in a row, ids out of range.
        InputError: INPUT-001 for a file that cannot be read.
        CalibrationError: CALIBRATION-002 for text without a tokenizer.
        OptionError: OPTION-002 for a length or number of tokens out of range.
    """
    check_range("length", length, low=2, high=2**31)
    if tokens is not None:
        check_range("tokens", tokens, low=1, high=2**63)
    options = TrainingTextOptions(packing=packing, field=field, dtype=dtype)
    length = length if longest is None else min(length, longest)
    if vocabulary is None and hasattr(tokenizer, "__len__"):
        vocabulary = len(tokenizer)
    if isinstance(text, Windows):
        options.refuse("packing", "field", "dtype", why="it is windows of tokens already")
        windows = text
    elif (arrays := _arrays(text, options)) is not None:
        windows = array_windows(*arrays, length=length, tokens=tokens, longest=longest, seed=seed)
    else:
        name, pieces = _pieces(text, options, seed)
        pack = _stream if packing == "stream" else _documents
        windows = pack(tokenizer, pieces, name, length, tokens)
    return checked(windows, longest=longest, vocabulary=vocabulary)


def check_readable(text: Any, options: TrainingTextOptions) -> None:
    """Refuse files that are not there or not to be read, before a model is loaded. Only their beginnings are read.

    Raises: as `training_windows`.
    """
    if _paths(text) is None:
        return
    if is_standard_library(text):
        options.refuse("field", "dtype", why="it is files of text")
    elif _arrays(text, options) is None:
        _pieces(text, options, seed=0)


def _arrays(text: Any, options: TrainingTextOptions) -> tuple[list[npt.NDArray[Any]], str] | None:
    """Arrays of token ids and their name, where the text is tokens."""
    paths = _paths(text)
    packed = isinstance(text, Tensor | np.ndarray) or any(path.suffix in SUFFIXES for path in paths or ())
    if not packed:
        return None
    options.refuse("packing", "field", why="it is token ids already")
    if not any(path.suffix == BINARY for path in paths or ()):
        options.refuse("dtype", why="only a .bin file is without a word of it")
    if isinstance(text, Tensor):
        if text.is_floating_point() or text.is_complex():
            raise unusable(
                f"token ids are integers, and these are {str(text.dtype).removeprefix('torch.')}{list(text.shape)}.",
                "give integers [N], one text, or [N, T], one window a row.",
            )
        return [text.detach().cpu().numpy()], "tokens"
    if isinstance(text, np.ndarray):
        return [text], "tokens"
    if others := [path.name for path in paths or () if path.suffix not in SUFFIXES]:
        raise unusable(f"files of tokens and text together: {others[0]!r} is text.", "give one or the other.")
    return [read_tokens(path, options.dtype) for path in paths or ()], _joined(paths or [])


def _pieces(text: Any, options: TrainingTextOptions, seed: int) -> tuple[str, Iterator[Piece]]:
    """The name of the text, and its pieces in their order."""
    options.refuse("dtype", why="it is of token ids in a .bin file")
    paths, field = _paths(text), options.field
    if isinstance(text, Documents) or (paths and not any(path.suffix == LINES or path.is_dir() for path in paths)):
        options.refuse("field", why="it has no rows")
    if isinstance(text, Documents):
        return text.name, shuffled([DocumentShelf(text)], seed)
    if paths is not None:
        if not paths:
            raise unusable("no training text given: the list is empty.", "give files, folders, or the word stdlib.")
        if is_standard_library(text):
            library = standard_library("calibration")
            name = f"{library.name.removesuffix(', calibration')}, not held out"
            return name, shuffled([DocumentShelf(library)], seed)
        shelves: list[Shelf] = [shelf for path in paths for shelf in file_shelves(path, field)]
        return _joined(paths), shuffled(shelves, seed)
    if isinstance(text, Mapping):
        if "train" not in text:
            raise unusable(
                f"a dictionary of data sets without a split 'train': it has {', '.join(map(repr, text)) or 'none'}.",
                "give one of its splits.",
            )
        text = text["train"]
    name = _name_of(text)
    if hasattr(text, "__getitem__") and _counted(text):
        return name, shuffled([DatasetShelf(text, field)], seed)
    if not isinstance(text, Iterable):
        raise unusable(
            f"{type(text).__name__} is no form of text that is known.",
            "give paths, Documents, a data set, an iterable of texts, or token ids.",
        )
    return name, rows(text, field)


def _paths(text: Any) -> list[Path] | None:
    """The paths, where the text is named by them."""
    entries = [text] if isinstance(text, str | Path) else text
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, str | Path) for entry in entries):
        return None
    if any("\n" in str(entry) for entry in entries):
        raise unusable(
            "strings are names of files, and one was given that has line breaks.",
            'give texts as skink.evaluation.Documents("a name", tuple(texts)), or as iter(texts).',
        )
    return [Path(entry) for entry in entries]


def _joined(paths: list[Path]) -> str:
    names = [path.name or str(path) for path in paths]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _name_of(dataset: Any) -> str:
    known = [getattr(getattr(dataset, "info", None), "dataset_name", None), getattr(dataset, "split", None)]
    return ", ".join(str(part) for part in known if part) or "a data set"


def _counted(dataset: Any) -> bool:
    try:
        return len(dataset) >= 0
    except (TypeError, NotImplementedError):
        return False


def _stream(tokenizer: Any, pieces: Iterator[Piece], name: str, length: int, tokens: int | None) -> Windows:
    """Pieces one after another, cut into windows; what is left at the end and fills none is not taken."""
    before, after = _marks(tokenizer)
    if before == after:
        # Where both are one token (GPT-2), one stands between two documents.
        after = []
    wanted = None if tokens is None else -(-tokens // length) * length
    parts = list(_taken(tokenizer, pieces, lambda piece, ids: _marked(piece, ids, before, after), wanted))
    read = sum(map(len, parts))
    count = (read if wanted is None else min(read, wanted)) // length
    if count == 0:
        raise too_little(name, read, length)
    stream = torch.from_numpy(np.concatenate(parts))
    return Windows(stream[: count * length].view(count, length), name)


def _documents(tokenizer: Any, pieces: Iterator[Piece], name: str, length: int, tokens: int | None) -> Windows:
    """Each document in a row of its own, as far as it fits, and padding behind it."""
    before, after = _marks(tokenizer)
    # An encoder is told by its separator where a text ends, even one that was cut.
    closed = bool(after) and getattr(tokenizer, "sep_token_id", None) == after[0]

    def row(piece: Piece, ids: Integers) -> Integers:
        whole = _marked(piece, ids, before, after)
        if len(whole) <= length:
            return whole
        return np.concatenate([whole[: length - 1], after]).astype(np.int64) if closed else whole[:length]

    beginnings = (piece for piece in pieces if piece.begins)
    kept = [ids for ids in _taken(tokenizer, beginnings, row, tokens) if len(ids) > 1]
    if not kept:
        raise too_little(name, 0, 2)
    pad = getattr(tokenizer, "pad_token_id", None)
    filled = torch.full((len(kept), max(map(len, kept))), 0 if pad is None else pad, dtype=torch.int64)
    padding = torch.zeros_like(filled)
    for index, ids in enumerate(kept):
        filled[index, : len(ids)] = torch.from_numpy(ids)
        padding[index, : len(ids)] = 1
    return Windows(filled, name, padding=None if bool(padding.all()) else padding)


def _taken(
    tokenizer: Any, pieces: Iterator[Piece], finish: Callable[[Piece, Integers], Integers], wanted: int | None
) -> Iterator[Integers]:
    """Finished token ids of the pieces until there are as many as wanted; not many more pieces are read."""
    batch: list[Piece] = []
    size = read = 0
    for piece in chain(pieces, [None]):
        if piece is not None:
            batch.append(piece)
            size += len(piece.content)
        # A token is four characters of English, or about so.
        enough = _BATCH if wanted is None else min(_BATCH, 4 * (wanted - read))
        if piece is not None and size < enough and len(batch) < _MANY:
            continue
        for known, ids in zip(batch, _ids(tokenizer, batch), strict=True):
            yield (finished := finish(known, ids))
            read += len(finished)
            if wanted is not None and read >= wanted:
                return
        batch, size = [], 0


def _marks(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that begin and end a document, as far as the tokenizer has them; an encoder's are cls and sep."""

    def first(*names: str) -> list[int]:
        known = (getattr(tokenizer, name, None) for name in names)
        return next(([token] for token in known if token is not None), [])

    return first("bos_token_id", "cls_token_id"), first("eos_token_id", "sep_token_id")


def _marked(piece: Piece, ids: Integers, before: list[int], after: list[int]) -> Integers:
    """The ids of a piece of text with its marks, where they are not there already; token ids stay as they are."""
    if not isinstance(piece.content, str):
        return ids
    begin = before if piece.begins and list(ids[:1]) != before else []
    end = after if piece.ends and list(ids[-1:]) != after else []
    return np.concatenate([begin, ids, end]).astype(np.int64)


def _ids(tokenizer: Any, batch: list[Piece]) -> Iterator[Integers]:
    """The token ids of each piece, without marks."""
    texts = [piece.content for piece in batch if isinstance(piece.content, str)]
    if texts and tokenizer is None:
        raise CalibrationError(
            "CALIBRATION-002",
            "training text was given, and there is no tokenizer to read it with.",
            fix="put tokenizer.json beside the checkpoint; in Python pass tokenizer=, or token ids as a tensor.",
        )
    # Not verbose: it would warn that a document is longer than the model's context, which windows take care of.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    encoded = iter(tokenizer(texts, **options)["input_ids"] if texts else ())
    for piece in batch:
        yield np.asarray(next(encoded), dtype=np.int64) if isinstance(piece.content, str) else piece.content
