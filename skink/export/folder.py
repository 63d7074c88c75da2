"""Output folders that are there whole or not at all."""

import errno
import hashlib
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skink.errors import OutputError

_PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def output_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `path` to write into, which takes the name `path` if the block ends well.

    If it does not, Ctrl-C included, the new folder is removed, and what stood at `path` before still does. What was
    left by a process that was killed outright is removed by the next one, on the same machine, that writes to `path`.

    Args:
        path: where the folder shall be; folders above it are made, and removed again on failure.
        overwrite: let the new folder take the place of one that exists (of a folder only, never of a file).

    Raises:
        OutputError: OUTPUT-001 where `path` exists, OUTPUT-002 for no space left or no right to write.
    """
    target = Path(os.path.abspath(path))
    _refuse_existing(target, overwrite)
    made: list[Path] = []
    partial: Path | None = None
    lock: int | None = None
    try:
        _make_parents(target.parent, made)
        _remove_abandoned(target)
        partial, lock = _make_partial(target)
        partial.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only their owner can read
        yield partial
        _refuse_existing(target, overwrite)
        _take_place(partial, target)
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for folder in reversed(made):
            # Somebody else may have put something there meanwhile.
            if not any(folder.iterdir()):
                folder.rmdir()
        reason = _reason(error, target)
        if reason is None:
            raise
        raise OutputError("OUTPUT-002", f"cannot write {target}: {reason}", fix=_fix(error)) from error
    finally:
        if lock is not None:
            os.close(lock)


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if overwrite and target.is_dir() and not target.is_symlink():
        return
    raise OutputError(
        "OUTPUT-001",
        f"{target} exists already.",
        fix="choose another folder, remove this one, or pass --overwrite."
        if target.is_dir()
        else "choose another name: this is a file.",
    )


def _make_parents(folder: Path, made: list[Path]) -> None:
    missing = [folder, *folder.parents]
    for parent in reversed([entry for entry in missing if not entry.exists()]):
        parent.mkdir(exist_ok=True)
        made.append(parent)


def _make_partial(target: Path) -> tuple[Path, int | None]:
    """A new folder, and what holds it locked for as long as this process lives; None where folders cannot be locked."""
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.{_host()}.", suffix=_PARTIAL, dir=target.parent))
        lock = _locked(partial, wait=True)
        # Between the two steps another process may have taken it for abandoned.
        if partial.is_dir():
            return partial, lock
        if lock is not None:
            os.close(lock)


def _remove_abandoned(target: Path) -> None:
    """Remove folders that nobody is writing to any more: the system gives up a process's locks when it dies.

    Other machines' are left alone, for on some file systems a lock is seen on one machine only.
    """
    known = re.compile(rf"\.{re.escape(target.name)}\.{_host()}\.[^.]*{re.escape(_PARTIAL)}")
    for folder in [entry for entry in target.parent.iterdir() if known.fullmatch(entry.name)]:
        lock = _locked(folder, wait=False)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path, *, wait: bool) -> int | None:
    """A descriptor that locks a folder until it is closed; None where it cannot be locked."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        found = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(found, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(found)
        return None
    return found


def _host() -> str:
    """A short name of this machine."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def _take_place(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(old / "folder")
    try:
        partial.rename(target)
    except BaseException:
        (old / "folder").rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _reason(error: BaseException, target: Path) -> str | None:
    """Why the place cannot be written, or None where the error is about something else."""
    if isinstance(error, OSError):
        if error.errno in _FULL:
            return "no space left."
        if error.errno in _REFUSED and _is_below(error.filename, target.parent):
            return "no right to write there."
        if error.errno == errno.ENOTDIR and _is_below(error.filename, target.parent):
            return "a part of the path is a file."
        return None
    # safetensors and others report a full disk in words only.
    return "no space left." if isinstance(error, Exception) and "No space left on device" in str(error) else None


def _is_below(name: object, folder: Path) -> bool:
    """Whether the error is about a file in `folder`, or about a folder on the way to it."""
    if not isinstance(name, str | bytes | os.PathLike):
        return False
    path = Path(os.path.abspath(os.fsdecode(name)))
    return path == folder or folder in path.parents or path in folder.parents


def _fix(error: BaseException) -> str:
    full = not isinstance(error, OSError) or error.errno in _FULL
    return "free some space, or choose a folder on another disk." if full else "choose a folder that you may write to."


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
