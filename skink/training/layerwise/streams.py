"""Values between layers, held for a whole text: in memory, or in files beyond a limit."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from skink.errors import OutputError


class Streams:
    """What is alive between two layers, one row for each window of a text; then between the next two, in its place.

    Files lie in a temporary folder that is gone as soon as they are mapped, so that the system frees them when the
    last tensor goes, however the process ends.

    Args:
        windows: how many rows.
        limit: most bytes that are held in memory; what is beyond is mapped from files.
    """

    def __init__(self, windows: int, limit: int) -> None:
        self._windows, self._limit = windows, limit
        self._now: list[Tensor] = []
        self._next: list[Tensor] = []

    def read(self, rows: Tensor) -> list[Tensor]:
        """Copies of the values of these windows, int64[n]: each [n, ...]."""
        return [held.index_select(0, rows) for held in self._now]

    def write(self, rows: Tensor, values: Sequence[Tensor]) -> None:
        """Keep what the next layers receive of these windows, each [n, ...]; they must have been read before.

        Raises:
            OutputError: OUTPUT-002 where there is no space for it.
        """
        if not self._next:
            spare = list(self._now)
            for value in values:
                shape = (self._windows, *value.shape[1:])
                fit = next(
                    (at for at, old in enumerate(spare) if old.shape == shape and old.dtype is value.dtype), None
                )
                self._next.append(self._allocate(shape, value) if fit is None else spare.pop(fit))
        for held, value in zip(self._next, values, strict=True):
            held.index_copy_(0, rows, value.to(held.device))

    def advance(self) -> None:
        """What was written is what is read from now on."""
        self._now, self._next = self._next, []

    def _allocate(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        size = math.prod(shape) * like.element_size()
        held = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in (*self._now, *self._next)}
        if sum(held.values()) + size <= self._limit:
            return torch.empty(shape, dtype=like.dtype)
        return _mapped(shape, like.dtype, size)


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
    """A tensor in a file that has no name any more."""
    try:
        with TemporaryDirectory(prefix="skink-layers-", ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "values"
            with path.open("wb") as file:
                # Space is taken now: writing to a hole in a mapped file would kill the process when the disk is full.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    # macOS and Windows have no such call.
                    file.truncate(size)
            return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    except OSError as error:
        raise OutputError(
            "OUTPUT-002",
            f"there is no space for {size / 2**20:,.0f} MiB of values between layers.",
            why=str(error),
            fix="give fewer tokens, a larger held_bytes where memory allows, or set TMPDIR to a folder with space.",
        ) from error
