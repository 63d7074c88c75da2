"""The machine and the versions that a measurement was made with; every report and benchmark carries them."""

import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """Where a number was measured.

    Args:
        processor: model name of the CPU.
        cores: physical cores, or logical ones where the system does not tell.
        processors: logical processors that this process may run on.
        threads: threads that PyTorch uses within an operator.
        memory: bytes of main memory; 0 where the system does not tell.
        system: operating system and its version.
        python: version.
        torch: version.
        transformers: version, empty when not installed.
        gpu: name of the current GPU, empty when there is none.
        skink: version, empty when run from a source tree that is not installed.
    """

    processor: str
    cores: int
    processors: int
    threads: int
    memory: int
    system: str
    python: str
    torch: str
    transformers: str
    gpu: str
    skink: str

    def __str__(self) -> str:
        processor = f"{self.processor}, {self.cores} cores ({self.processors} usable), {self.threads} threads"
        memory = f"{self.memory / 2**30:.0f} GiB" if self.memory else ""
        packages = (("PyTorch", self.torch), ("transformers", self.transformers), ("Skink", self.skink))
        versions = ", ".join([self.python, *(f"{name} {version}" for name, version in packages if version)])
        return "; ".join(part for part in (processor, memory, self.gpu, self.system, versions) if part)


def machine() -> Machine:
    """This machine as it is now: threads can change while a process runs."""
    return Machine(
        processor=_processor(),
        cores=_physical_cores() or os.cpu_count() or 1,
        processors=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory=_memory(),
        system=f"{platform.system()} {platform.release()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        torch=torch.__version__,
        transformers=_version("transformers"),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        skink=_version("skink"),
    )


def peak_memory() -> int:
    """The most main memory that this process has held so far, in bytes; 0 where the system does not tell.

    It never falls: to compare two models, run each in a process of its own.
    """
    if sys.platform == "win32":
        return 0
    # Preferred, because ru_maxrss of a process begins at that of the one which started it.
    for line in _lines("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kibibytes, except on macOS.
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _physical_cores() -> int:
    """Distinct pairs of socket and core; 0 where the system does not tell."""
    pairs, socket = set(), ""
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() == "physical id":
            socket = value
        elif name.strip() == "core id":
            pairs.add((socket, value))
    return len(pairs)


def _lines(path: str) -> list[str]:
    """The lines of a file that only some systems have."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _memory() -> int:
    if sys.platform == "win32":
        return 0
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
