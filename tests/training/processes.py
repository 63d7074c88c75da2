"""Processes of their own, in which warnings are errors."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`python *arguments` as a process, what it says in one stream."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def two(*arguments: str) -> None:
    """Run `python *arguments` in two processes that train together, as `torchrun` starts them; both must succeed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [start(*arguments, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)]
    said = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(said)
