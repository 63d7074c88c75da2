"""Text that is tokens already: tensors, arrays and files of token ids, in windows."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from skink.errors import InputError, RecoveryError
from skink.graph.windows import Windows

BINARY = ".bin"
SUFFIXES = (".npy", BINARY)

# What tokens of a file without a header can be.
DTYPES = ("uint16", "uint32", "int32", "int64")

_ROWS = 1 << 20  # tokens looked at together
_FIX = "give integers [N], one text, or [N, T], one window a row."


def array_windows(
    arrays: Sequence[npt.NDArray[Any]], name: str, *, length: int, tokens: int | None, longest: int | None, seed: int
) -> Windows:
    """Windows of token ids int64[N, length], of texts [N] that are cut or of windows [N, T] that stay as they are.

    All windows in their order, or with `tokens` as many as hold so many tokens, chosen by the seed. Tokens int64 of
    which all are taken are not copied, and so stay memory-mapped.

    Raises: RECOVER-008 for anything but integers [N] or [N, T], and for too few.
    """
    parts = [_rows(array, name, length) for array in arrays]
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) > 1:
        raise unusable(f"{name} holds windows of {widths[0]} and of {widths[-1]} tokens.", "give windows of one width.")
    width, count = widths[0], sum(part.shape[0] for part in parts)
    if count == 0 or width < 2:
        read = sum(array.size for array in arrays)
        raise too_little(name, read, length)
    if longest is not None and width > longest:
        raise unusable(
            f"windows of {width} tokens in {name}, and the model reads {longest} at most.",
            f"give the tokens as one text [N], which is cut, or windows of at most {longest} tokens.",
        )
    wanted = count if tokens is None else -(-tokens // width)
    if wanted < count:
        order = np.sort(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted].numpy())
        begins = np.cumsum([0, *(part.shape[0] for part in parts)])
        parts = [
            part[order[(order >= begin) & (order < begin + part.shape[0])] - begin]
            for part, begin in zip(parts, begins[:-1], strict=True)
        ]
    tensors = [_tensor(part) for part in parts]
    return Windows(tensors[0] if len(tensors) == 1 else torch.cat(tensors), name)


def read_tokens(path: Path, dtype: str | None) -> npt.NDArray[Any]:
    """Token ids of a .npy file, or of a .bin file of nothing but integers; memory-mapped.

    The integers of `tokens.bin` are of the dtype given, or the one that `tokens.json` beside it names as
    `{"dtype": "uint16"}`.

    Raises: INPUT-001 for a file that cannot be read; RECOVER-008 where nothing says of what dtype it is.
    """
    try:
        # "c": a page that were written to would be a copy. Nothing writes, and the tensors are not marked read-only.
        if path.suffix == ".npy":
            array: npt.NDArray[Any] = np.load(path, mmap_mode="c", allow_pickle=False)
            return array
        known = np.dtype(_named_dtype(path, dtype))
        if path.stat().st_size % known.itemsize:
            raise unusable(
                f"{path.name!r} has {path.stat().st_size} bytes, which are no whole number of {known.name}.",
                f"give the dtype that it was written with: {', '.join(DTYPES)}.",
            )
        return np.memmap(path, dtype=known, mode="c")
    except (OSError, ValueError) as error:
        raise InputError(
            "INPUT-001", f"{str(path)!r} cannot be read as token ids.", why=f"{str(error).rstrip('.')}.", fix=_FIX
        ) from error


def checked(windows: Windows, *, longest: int | None, vocabulary: int | None) -> Windows:
    """The windows, with the SHA-256 of their tokens where they have none.

    Raises: RECOVER-008 for tokens that are not int64[N, T], that are too long for the model or that it does not know.
    """
    tokens, padding = windows.tokens, windows.padding
    shape = f"{str(tokens.dtype).removeprefix('torch.')}{list(tokens.shape)}"
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0 or tokens.shape[1] < 2:
        raise unusable(f"windows of training text are int64[N, T] with T of 2 and more, and these are {shape}.", _FIX)
    if padding is not None and padding.shape != tokens.shape:
        raise unusable(
            f"padding of shape {list(padding.shape)} does not fit tokens {shape}.", "give one number for each token."
        )
    if longest is not None and tokens.shape[1] > longest:
        raise unusable(
            f"windows of {tokens.shape[1]} tokens, and the model reads {longest} at most.", "cut shorter windows."
        )
    digest = hashlib.sha256(json.dumps(list(tokens.shape)).encode())
    rows = max(1, _ROWS // tokens.shape[1])
    for begin in range(0, tokens.shape[0], rows):
        part = tokens[begin : begin + rows].cpu()
        _check_ids(part, begin, vocabulary)
        digest.update(np.ascontiguousarray(part.numpy(), dtype="<i8").data)
        if padding is not None:
            digest.update(np.ascontiguousarray(padding[begin : begin + rows].cpu().numpy() != 0).data)
    return windows if windows.sha256 else replace(windows, sha256=digest.hexdigest())


def unusable(what: str, fix: str, *, where: str = "") -> RecoveryError:
    """RECOVER-008 for what was given as training text."""
    return RecoveryError("RECOVER-008", what, where=where, fix=fix)


def too_little(name: str, tokens: int, length: int) -> RecoveryError:
    """RECOVER-008 for text that does not fill one window."""
    return unusable(
        f"too little training text: {name} gives {tokens} tokens, and one window needs {length}.",
        "give more text, or cut shorter windows (--training-length); short texts of which each is a whole go with "
        "--training-packing document.",
    )


def _check_ids(part: Tensor, row: int, vocabulary: int | None) -> None:
    low, high = int(part.min()), int(part.max())
    if low >= 0 and (vocabulary is None or high < vocabulary):
        return
    wrong = (part < 0) if vocabulary is None else (part < 0) | (part >= vocabulary)
    at = [int(place) for place in wrong.nonzero()[0]]
    known = "ids begin at 0" if vocabulary is None else f"the model knows 0 to {vocabulary - 1}"
    raise unusable(
        f"training tokens run from {low} to {high}, and {known}.",
        "make the tokens with the model's own tokenizer, and read a file with the dtype it was written with.",
        where=f"window {row + at[0]}, token {at[1]}: {int(part[at[0], at[1]])}",
    )


def _rows(array: npt.NDArray[Any], name: str, length: int) -> npt.NDArray[Any]:
    """An array as rows of tokens; one text [N] is cut, and its end that fills no window is left out."""
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise unusable(f"{name} is {array.dtype.name}{list(array.shape)}, which are no token ids.", _FIX)
    if array.ndim == 2:
        return array
    count = len(array) // length
    return array[: count * length].reshape(count, length)


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    wide = array.astype(np.int64, copy=False)
    with warnings.catch_warnings():
        # A read-only array makes torch warn of writing; nobody writes to tokens.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.ascontiguousarray(wide))


def _named_dtype(path: Path, dtype: str | None) -> str:
    sidecar = path.with_suffix(".json")
    if dtype is None and sidecar.is_file():
        record = json.loads(sidecar.read_text(encoding="utf-8"))
        dtype = record.get("dtype") if isinstance(record, dict) else None
    if dtype not in DTYPES:
        said = "nothing says" if dtype is None else f"{dtype!r} is none that is read; nothing else says"
        raise unusable(
            f"{path.name!r} is a file of integers without a header, and {said} of which dtype.",
            f"name it by --training-dtype: {', '.join(DTYPES)}; or write it beside the file: "
            f'{sidecar.name} with {{"dtype": "uint16"}}.',
        )
    return dtype
