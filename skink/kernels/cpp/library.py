"""Loads the compiled kernels, where they were built, and registers their shapes with PyTorch."""

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from skink.errors import OptionError, suggest
from skink.settings import settings

_FILE = "libskink_kernels.so"
_FIX = (
    "To have them, with a C++ compiler and CMake at hand: "
    "pip install --no-build-isolation --no-deps --force-reinstall <folder of Skink's source>"
)


@dataclass(frozen=True)
class Library:
    """The compiled kernels of this process.

    Args:
        available: whether `torch.ops.skink_cpp.*` can be called.
        reason: why not; empty where available.
        path: the shared library.
        instruction_sets: those compiled in that this processor runs, from the plainest up.
        instruction_set: the one in use when the library was loaded.
    """

    available: bool
    reason: str = ""
    path: Path | None = None
    instruction_sets: tuple[str, ...] = ()
    instruction_set: str = ""


@lru_cache(maxsize=1)
def library() -> Library:
    """The kernels, loaded by the first call; where there are none, that call says so, once.

    Raises:
        OptionError: OPTION-002, `SKINK_INSTRUCTION_SET` names a set that this processor or build does not have.
    """
    if settings().kernels == "reference":
        return Library(available=False, reason="SKINK_KERNELS=reference")
    path = _find()
    if path is None:
        return _unavailable("the C++ kernels were not built when skink was installed")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return _unavailable(f"the C++ kernels could not be loaded ({str(error).splitlines()[0]})")
    _register_fakes()
    if settings().instruction_set:
        _select(path, settings().instruction_set)
    binary = _open(path)
    return Library(
        available=True,
        path=path,
        instruction_sets=_instruction_sets(path),
        instruction_set=binary.skink_selected_instruction_set().decode(),
    )


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Runs the kernels of one instruction set inside the block; for tests and comparisons, not for several threads.

    Raises:
        OptionError: OPTION-002, the set is not among `library().instruction_sets`.
    """
    path = library().path
    if path is None:
        raise OptionError("OPTION-002", f"instruction set {name!r} needs the C++ kernels.", why=library().reason)
    before = _open(path).skink_selected_instruction_set().decode()
    _select(path, name)
    try:
        yield
    finally:
        _select(path, before)


def _unavailable(reason: str) -> Library:
    logging.getLogger(__name__).warning("Skink runs on its reference kernels, which are slower: %s. %s", reason, _FIX)
    return Library(available=False, reason=reason)


def _find() -> Path | None:
    # In an editable install the package has two folders, and the compiled library lies in the second.
    from skink.kernels import cpp

    return next((Path(folder) / _FILE for folder in cpp.__path__ if (Path(folder) / _FILE).exists()), None)


@lru_cache(maxsize=1)
def _open(path: Path) -> ctypes.CDLL:
    binary = ctypes.CDLL(str(path))
    binary.skink_instruction_set.restype = ctypes.c_char_p
    binary.skink_selected_instruction_set.restype = ctypes.c_char_p
    return binary


def _instruction_sets(path: Path) -> tuple[str, ...]:
    names: list[str] = []
    while name := _open(path).skink_instruction_set(len(names)):
        names.append(name.decode())
    return tuple(names)


def _select(path: Path, name: str) -> None:
    if not _open(path).skink_select_instruction_set(name.encode()):
        raise OptionError(
            "OPTION-002",
            f"instruction set {name!r} is not one that this processor runs and the kernels were built for.",
            fix=f"set SKINK_INSTRUCTION_SET to one of them, or unset it; {suggest(name, _instruction_sets(path))}",
        )


def _register_fakes() -> None:
    """Give each kernel its op's shapes: both are called alike."""
    from skink.kernels import OPS

    for op in OPS:
        if hasattr(torch.ops.skink_cpp, op.name):
            torch.library.register_fake(f"skink_cpp::{op.name}", op.fake)
