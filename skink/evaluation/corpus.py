"""Text to calibrate on and to score, from the interpreter's standard library or the user's files, in windows of tokens.

The standard library's split is that of the model that ships (skink/assets/stdlib-llama/README.md): a file is held out
when the SHA-1 of its path relative to the library is a multiple of 20. Nothing here draws a random number: equal text
gives equal windows.
"""

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from skink.errors import CalibrationError, InputError, check_range

Split = Literal["calibration", "held-out"]

# The longest piece of text that counts as one document when documents are sampled, in characters.
_PIECE = 32_768

_TEXT_FIX = 'give UTF-8 text files, .jsonl files whose lines are objects with a "text" field, or folders of them.'


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, if there is one."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, if there is one."""

    def __call__(self, text: list[str], **options: bool) -> Mapping[str, Any]:
        """Ids of each text, under "input_ids"."""


@dataclass(frozen=True)
class Documents:
    """Texts and the name that reports give them.

    Args:
        name: where the texts are from, without a path of this machine.
        texts: one string per document.
    """

    name: str
    texts: tuple[str, ...]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the texts in their order, in hexadecimal. Equal on every machine; the name does not count."""
        digest = hashlib.sha256()
        for text in self.texts:
            data = text.encode("utf-8", "surrogatepass")
            # The length first, so that moving text from one document to the next changes the hash.
            digest.update(f"{len(data)}\n".encode())
            digest.update(data)
        return digest.hexdigest()


def standard_library(split: Split) -> Documents:
    """The running interpreter's standard library: the files held out from the model that ships, or all others.

    Files are in the order of their paths; each begins with the line `# file: <path relative to the library>`.
    Left out, as they were when the model was trained: installed packages, lib2to3, build configuration, pydoc's data,
    code pages, files that are broken on purpose, and files under 400 or over 400,000 characters.

    Raises: INPUT-001 when this interpreter has no library sources on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for relative in sorted(_library_files(root), key=lambda path: path.parts):
        if _is_held_out(relative) != (split == "held-out"):
            continue
        try:
            text = (root / relative).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if 400 <= len(text) <= 400_000:
            texts.append(f"# file: {relative.as_posix()}\n{text}")
    if not texts:
        raise InputError(
            "INPUT-001",
            f"the standard library of this Python has no source files to read for {split!r}.",
            where=str(root),
            fix="use a Python that is installed with its sources, or give text files of your own.",
        )
    version = f"{platform.python_implementation()} {platform.python_version()}"
    return Documents(f"{version} standard library, {split}", tuple(texts))


def text_files(paths: Sequence[Path]) -> Documents:
    """The text of files: any UTF-8 text is one document, each line of a .jsonl file is one (its field "text").

    Of a folder, every text file under it in the order of their paths, without hidden files and those that are not text.
    Documents that are blank are dropped.

    Raises: INPUT-001 for a path that is missing or unreadable; CALIBRATION-001 when no text is left.
    """
    texts: list[str] = []
    for path in paths:
        if path.is_dir():
            for file in files_below(path):
                texts.extend(_read(file, only_text=True))
        else:
            texts.extend(_read(path, only_text=False))
    texts = [text for text in texts if text.strip()]
    names = ", ".join(path.name or str(path) for path in paths)
    if not texts:
        what = f"no text in {names!r}: every document is empty." if names else "no text files given."
        raise CalibrationError("CALIBRATION-001", what, fix=_TEXT_FIX)
    return Documents(names, tuple(texts))


def token_stream(documents: Documents, tokenizer: Tokenizer) -> Tensor:
    """All tokens of the documents one after another, int64 [N].

    Each document stands between the tokenizer's begin and end tokens, where it has them; where both are the same token
    (GPT-2), one stands before each document.
    """
    return _encode(documents.texts, tokenizer)


def token_windows(
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    length: int,
    count: int | None,
    over: Literal["stream", "sample"] = "stream",
) -> Tensor:
    """Windows of consecutive tokens that do not overlap, int64 [windows, length]; equal arguments give equal windows.

    Args:
        documents: the text; see `token_stream` for how it becomes tokens.
        tokenizer: a Hugging Face tokenizer.
        length: tokens per window, at least 2.
        count: windows wanted, their starts evenly spaced from the first token to the last; fewer if there is less text.
            None: all, end to end.
        over: `stream` spaces them over all tokens of all documents, and so tokenises everything. `sample` first
            chooses as many evenly spaced documents as are needed, at least `count` of them, and tokenises only those
            (a document of more than 32,768 characters counts as several). Without `count` both are the same.

    Raises: CALIBRATION-001 when there is not enough text for one window; OPTION-002 for a length or count out of range.
    """
    _check_windows(length, count)
    if count is None or over == "stream":
        stream = _encode(documents.texts, tokenizer)
    else:
        texts = tuple(_pieces(documents.texts))
        chosen = min(count, len(texts))
        stream = _encode(_evenly(texts, chosen), tokenizer)
        while len(stream) < count * length and chosen < len(texts):
            chosen = min(2 * chosen, len(texts))
            stream = _encode(_evenly(texts, chosen), tokenizer)
    return cut_windows(stream, length=length, count=count, name=documents.name)


def cut_windows(stream: Tensor, *, length: int, count: int | None, name: str = "the text") -> Tensor:
    """Windows of a token stream [N], int64 [windows, length]; arguments and errors as of `token_windows`.

    Window i of `count` starts at token floor(i * (N - length) / (count - 1)).
    """
    _check_windows(length, count)
    available = len(stream) // length
    if available == 0:
        raise CalibrationError(
            "CALIBRATION-001",
            f"too little text: {name!r} gives {len(stream)} tokens, and one window needs {length}.",
            fix="give more text, or a shorter length.",
        )
    if count is None or count > available:
        return stream[: available * length].view(available, length).clone()
    last = len(stream) - length
    starts = [index * last // max(count - 1, 1) for index in range(count)]
    return torch.stack([stream[start : start + length] for start in starts])


def window_stride(tokens: int, *, length: int, count: int | None) -> float:
    """Mean distance in tokens between the starts of the windows that `cut_windows` cuts from that many tokens."""
    if count is None or count > tokens // length or count == 1:
        return float(length)
    # At least `length`, because there is text for `count` windows: they never overlap.
    return (tokens - length) / (count - 1)


def _check_windows(length: int, count: int | None) -> None:
    check_range("length", length, low=2, high=2**31)
    if count is not None:
        check_range("count", count, low=1, high=2**31)


def _is_held_out(relative: Path) -> bool:
    return int(hashlib.sha1(relative.as_posix().encode(), usedforsecurity=False).hexdigest(), 16) % 20 == 0


def _is_wanted(relative: Path) -> bool:
    parts = relative.parts
    return not (
        parts[0] in ("site-packages", "__pycache__", "lib2to3")
        or parts[0].startswith("config-")
        or "pydoc_data" in parts
        or ("encodings" in parts and relative.name.startswith("cp"))
        or any("bad" in part for part in parts)
    )


def _library_files(root: Path) -> Iterator[Path]:
    """Paths of the library's files that belong to either split, relative to `root`."""
    for folder, folders, names in os.walk(root):
        if Path(folder) == root:
            # Not walked at all: installed packages can be many thousands of files.
            folders[:] = [name for name in folders if _is_wanted(Path(name))]
        for name in names:
            relative = (Path(folder) / name).relative_to(root)
            if name.endswith(".py") and _is_wanted(relative):
                yield relative


def files_below(folder: Path) -> list[Path]:
    """Every file under a folder but the hidden ones, in the order of their paths."""

    def refuse(error: OSError) -> None:
        raise unreadable(Path(error.filename or folder), error.strerror or str(error)) from error

    found: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found.extend(Path(root) / name for name in names if not name.startswith("."))
    return sorted(found, key=lambda path: path.parts)


def _read(path: Path, *, only_text: bool) -> list[str]:
    """The documents of one file. With `only_text`, a file that is not text gives none instead of an error."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        if only_text:
            return []
        why = f"it is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}."
        raise unreadable(path, why) from error
    except OSError as error:
        raise unreadable(path, f"{error.strerror or error}.") from error
    if path.suffix == ".jsonl":
        return [_field(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    # A NUL is valid UTF-8, and the surest sign of a file that is not text.
    return [] if only_text and "\0" in text else [text]


def _field(path: Path, number: int, line: str) -> str:
    """The field "text" of one line of a .jsonl file."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise unreadable(path, f"line {number} is not JSON: {error}.") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise unreadable(path, f'line {number} is not an object with a string in its field "text".')
    return text


def unreadable(path: Path, why: str) -> InputError:
    """INPUT-001 for a file that is not the text that it should be."""
    return InputError("INPUT-001", f"{str(path)!r} cannot be read as text.", why=why, fix=_TEXT_FIX)


def _pieces(texts: Sequence[str]) -> Iterator[str]:
    """Texts in pieces of at most `_PIECE` characters, so that no single one of a sample is long to tokenise."""
    for text in texts:
        for start in range(0, len(text), _PIECE):
            yield text[start : start + _PIECE]


def _evenly(texts: Sequence[str], count: int) -> list[str]:
    """`count` of the texts, evenly spaced, in their order."""
    return [texts[index * len(texts) // count] for index in range(count)]


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """Token ids of texts with the marks around each, int64 [N]."""
    if not texts:
        return torch.empty(0, dtype=torch.int64)
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id in (None, tokenizer.bos_token_id) else [tokenizer.eos_token_id]
    # Not verbose: it would warn that a document is longer than the model's context, which windows take care of.
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.cat([torch.tensor([*before, *ids, *after], dtype=torch.int64) for ids in encoded])
