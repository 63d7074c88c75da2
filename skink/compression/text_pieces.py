"""Text in pieces that are read when they are wanted: documents, files, data sets and iterables.

A piece is a document, or a part of a long one: so that a fair sample of a large file needs no more of it than the
sample. Files are cut where a line ends, near multiples of 64 KiB.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from skink.errors import RecoveryError
from skink.evaluation.corpus import Documents, files_below, unreadable

Integers = npt.NDArray[np.int64]

TEXT, TOKENS = "text", "input_ids"

LINES = ".jsonl"  # the suffix of files with a document a line

_BLOCK = 1 << 16  # bytes of a file, or characters of a document, in one piece
_LONGEST_LINE = 1 << 26  # bytes of one line of a .jsonl file
_PACKED = (".parquet", ".arrow", ".gz", ".zst", ".zip", ".xz", ".bz2")
_FIX = (
    f'give text, or rows with a field "{TEXT}" (a string) or "{TOKENS}" (token ids); another field by its name '
    "(--training-field)."
)


@dataclass(frozen=True)
class Piece:
    """A document or a part of it.

    Args:
        content: text, or token ids int64[N].
        begins: whether the document begins here.
        ends: whether it ends here.
    """

    content: str | Integers
    begins: bool = True
    ends: bool = True


class Shelf(Protocol):
    """Pieces that can be taken in any order."""

    def __len__(self) -> int:
        """How many places there are."""

    def read(self, place: int) -> Iterable[Piece]:
        """The pieces at a place: none, one, or several."""


def shuffled(shelves: Sequence[Shelf], seed: int) -> Iterator[Piece]:
    """All pieces of some shelves, in an order that follows from the seed."""
    ends = list(accumulate(map(len, shelves)))
    order = torch.randperm(ends[-1] if ends else 0, generator=torch.Generator().manual_seed(seed))
    for index in order:
        place = int(index)
        shelf = bisect_right(ends, place)
        yield from shelves[shelf].read(place - (ends[shelf - 1] if shelf else 0))


class DocumentShelf:
    """Texts in memory."""

    def __init__(self, documents: Documents) -> None:
        self.texts = [text for text in documents.texts if text.strip()]
        self.places = [(index, start) for index, text in enumerate(self.texts) for start in range(0, len(text), _BLOCK)]

    def __len__(self) -> int:
        return len(self.places)

    def read(self, place: int) -> Iterator[Piece]:
        """The part of a text that begins there."""
        index, start = self.places[place]
        text = self.texts[index]
        part = text[self._cut(text, start) : (end := self._cut(text, start + _BLOCK))]
        if part:
            yield Piece(part, start == 0, end == len(text))

    @staticmethod
    def _cut(text: str, near: int) -> int:
        """Behind the first line end from a place on, or the place itself where none is near."""
        if near <= 0 or near >= len(text):
            return max(0, min(near, len(text)))
        return text.find("\n", near, near + _BLOCK // 16) + 1 or near


class FileShelf:
    """A text file: one document, or in a .jsonl file one a line.

    Args:
        path: of the file.
        field: of a line of a .jsonl file; None: "text", or else "input_ids".
        only_text: whether a file that is not text gives nothing instead of an error.
    """

    def __init__(self, path: Path, *, field: str | None = None, only_text: bool = False) -> None:
        self.path, self.field, self.only_text = path, field, only_text
        self.lines = path.suffix == LINES
        if path.suffix in _PACKED and not only_text:
            raise RecoveryError(
                "RECOVER-008",
                f"{path.name!r} is packed, and is not read as text.",
                fix="unpack it; or load it with datasets.load_dataset, and give the data set in Python.",
            )
        try:
            self.size = path.stat().st_size
            if only_text and not self._looks_like_text():
                self.size = 0
        except OSError as error:
            raise unreadable(path, f"{error.strerror or error}.") from error

    def __len__(self) -> int:
        return -(-self.size // _BLOCK)

    def read(self, place: int) -> Iterator[Piece]:
        """The part of the file that begins there, or the lines that do."""
        try:
            yield from self._lines(place) if self.lines else self._part(place)
        except UnicodeDecodeError as error:
            if not self.only_text:
                why = f"it is not UTF-8 text: byte {error.start} of a part is {error.object[error.start]:#04x}."
                raise unreadable(self.path, why) from error
        except OSError as error:
            raise unreadable(self.path, f"{error.strerror or error}.") from error

    def _looks_like_text(self) -> bool:
        with self.path.open("rb") as file:
            begin = file.read(4096)
        # A NUL is valid UTF-8, and the surest sign of a file that is not text. The last character may be cut.
        return b"\0" not in begin and "\ufffd" not in begin.decode("utf-8", "replace")[:-1]

    def _part(self, place: int) -> Iterator[Piece]:
        with self.path.open("rb") as file:

            def cut(near: int) -> int:
                if near in (0, self.size):
                    return near
                file.seek(near)
                after = file.read(_BLOCK // 16)
                if b"\n" in after:
                    return near + after.index(b"\n") + 1
                # No line ends near: before the next character, whose first byte is not 10xxxxxx.
                return near + next((index for index, byte in enumerate(after) if byte & 0xC0 != 0x80), 0)

            start, end = cut(place * _BLOCK), cut(min((place + 1) * _BLOCK, self.size))
            file.seek(start)
            text = file.read(end - start).decode("utf-8-sig" if start == 0 else "utf-8")
        if text:
            yield Piece(text.replace("\r\n", "\n").replace("\r", "\n"), start == 0, end == self.size)

    def _lines(self, place: int) -> Iterator[Piece]:
        start, end = place * _BLOCK, min((place + 1) * _BLOCK, self.size)
        with self.path.open("rb") as file:
            if start:
                # The line that has begun before belongs to the part before.
                file.seek(start - 1)
                self._line(file)
            while (begin := file.tell()) < end:
                line = self._line(file).decode("utf-8-sig" if begin == 0 else "utf-8")
                if not line.strip():
                    continue
                where = f"{self.path.name}, the line at byte {begin}"
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise unreadable(self.path, f"the line at byte {begin} is not JSON: {error}.") from error
                yield from row_piece(record, self.field, where)

    def _line(self, file: Any) -> bytes:
        line: bytes = file.readline(_LONGEST_LINE)
        if len(line) == _LONGEST_LINE:
            raise unreadable(self.path, f"it has a line of more than {_LONGEST_LINE >> 20} MiB.")
        return line


class DatasetShelf:
    """A data set that can be counted and indexed, of rows or texts."""

    def __init__(self, dataset: Any, field: str | None) -> None:
        self.dataset, self.field = _narrow(dataset, field), field

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, place: int) -> Iterator[Piece]:
        """The row there."""
        yield from row_piece(self.dataset[place], self.field, f"row {place}")


def rows(dataset: Iterable[Any], field: str | None) -> Iterator[Piece]:
    """Pieces of rows or texts that can only be read one after another, in their order."""
    for place, row in enumerate(_narrow(dataset, field)):
        yield from row_piece(row, field, f"row {place}")


def row_piece(row: Any, field: str | None, where: str) -> Iterator[Piece]:
    """The piece that one row of a data set gives; none where its text is null or blank.

    Args:
        row: text, token ids, or a mapping with one of them in a field. An `attention_mask` beside token ids says which
            of them are padding, and is obeyed.
        field: its name; None: "text", or else "input_ids".
        where: for the error.

    Raises: RECOVER-008 where there is neither.
    """
    value, mask = row, None
    if isinstance(row, Mapping):
        name = field or (TEXT if TEXT in row else TOKENS)
        if name not in row:
            raise _no_text(f"a row has no field {_wanted(field)}: it has {', '.join(map(repr, row)) or 'none'}.", where)
        value, mask = row[name], row.get("attention_mask")
    if value is None or (isinstance(value, str) and not value.strip()):
        return
    if isinstance(value, str):
        yield Piece(value)
        return
    tokens = np.asarray(value)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        kind = f"{tokens.dtype}{list(tokens.shape)}" if tokens.dtype.kind in "iufb" else type(value).__name__
        raise _no_text(f"a row is neither text nor a list of token ids: it is {kind}.", where)
    if mask is not None and np.shape(mask) == tokens.shape:
        tokens = tokens[np.asarray(mask) != 0]
    if tokens.size:
        yield Piece(tokens.astype(np.int64))


def file_shelves(path: Path, field: str | None) -> list[Shelf]:
    """A file, or all text files below a folder in the order of their paths."""
    if path.is_dir():
        return [FileShelf(file, field=field, only_text=True) for file in files_below(path)]
    return [FileShelf(path, field=field)]


def _narrow(dataset: Any, field: str | None) -> Any:
    """A data set with no columns but those that are read; others (images, audio) can be slow to decode."""
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or not hasattr(dataset, "select_columns"):
        return dataset
    name = field or (TEXT if TEXT in columns else TOKENS)
    if name not in columns:
        listed = ", ".join(map(repr, columns)) or "none"
        raise _no_text(f"the data set has no column {_wanted(field)}: it has {listed}.", "")
    masks = ["attention_mask"] if name == TOKENS and "attention_mask" in columns else []
    return dataset.select_columns([name, *masks])


def _no_text(what: str, where: str) -> RecoveryError:
    return RecoveryError("RECOVER-008", what, where=where, fix=_FIX)


def _wanted(field: str | None) -> str:
    return repr(field) if field else f"{TEXT!r} or {TOKENS!r}"
