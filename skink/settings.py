"""Settings that come from the environment: read here, once, and nowhere else. Listed in docs/environment.md."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from skink.errors import OptionError, suggest


@dataclass(frozen=True)
class Settings:
    """What the environment may set.

    Args:
        verify: 0 off; 1 structure and shapes after each pass; 2 numbers too; 3 numbers after every single edit.
            `SKINK_VERIFY`, default 2.
        dump: folder for the text of every program that a pass changed, for the log of edits, and for reproducers.
            `SKINK_DUMP`, default none.
        rewrite_limit: the most edits that pipelines make to a program. `SKINK_REWRITE_LIMIT`, default none.
        trace_match: a rule's name, or how it begins: how far that rule's pattern matched is logged.
            `SKINK_TRACE_MATCH`, default none.
        instruction_set: forces one instruction set of the C++ kernels (`baseline`, `avx2`, `avx512`), for tests and
            comparisons. `SKINK_INSTRUCTION_SET`, default the best that the processor has.
        kernels: `auto` uses the C++ kernels where they are built, `reference` never does. `SKINK_KERNELS`.
        break_even: `measure` lets measured times decide how low-rank layers run, `off` takes the fused kernel wherever
            one serves. `SKINK_BREAK_EVEN`.
        cache: folder for what was measured on this machine. `SKINK_CACHE`, default the user's own: see `cache_folder`.
        process: this process's place among those that `torchrun` or `accelerate launch` started. `RANK`, default 0.
        local_process: its place among those on this machine, the number of its device. `LOCAL_RANK`, default 0.
        processes: how many they are. `WORLD_SIZE`, default 1.
    """

    verify: int = 2
    dump: Path | None = None
    rewrite_limit: int | None = None
    trace_match: str = ""
    instruction_set: str = ""
    kernels: str = "auto"
    break_even: str = "measure"
    cache: Path | None = None
    process: int = 0
    local_process: int = 0
    processes: int = 1

    @property
    def main_process(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.process == 0


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process.

    Raises:
        OptionError: OPTION-002 where a variable has a value that it cannot have.
    """
    dump = os.environ.get("SKINK_DUMP", "")
    cache = os.environ.get("SKINK_CACHE", "")
    return Settings(
        verify=int(_choice("SKINK_VERIFY", "2", ("0", "1", "2", "3"))),
        dump=Path(dump) if dump else None,
        rewrite_limit=_number("SKINK_REWRITE_LIMIT"),
        trace_match=os.environ.get("SKINK_TRACE_MATCH", ""),
        # Which sets there are, the compiled library knows.
        instruction_set=os.environ.get("SKINK_INSTRUCTION_SET", ""),
        kernels=_choice("SKINK_KERNELS", "auto", ("auto", "reference")),
        break_even=_choice("SKINK_BREAK_EVEN", "measure", ("measure", "off")),
        cache=Path(cache) if cache else None,
        process=_number("RANK") or 0,
        local_process=_number("LOCAL_RANK") or 0,
        processes=_number("WORLD_SIZE") or 1,
    )


def cache_folder() -> Path:
    """Where what was measured on this machine is kept: `SKINK_CACHE`, or `skink` in the user's folder of caches."""
    chosen = settings().cache
    if chosen is not None:
        return chosen
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "skink"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "skink"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skink"


def _choice(variable: str, default: str, valid: Sequence[str]) -> str:
    value = os.environ.get(variable) or default
    if value not in valid:
        raise OptionError(
            "OPTION-002",
            f"the environment variable {variable} is {value!r}, which is none of its values.",
            fix=suggest(value, valid),
        )
    return value


def _number(variable: str) -> int | None:
    value = os.environ.get(variable, "")
    if not value:
        return None
    if not (value.isascii() and value.isdigit()):
        raise OptionError(
            "OPTION-002",
            f"the environment variable {variable} is {value!r}, not a number from 0 on.",
            fix="give digits.",
        )
    return int(value)
