"""Processes meet; tests/cli/test_compress_training.py has two that train."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from skink.compression.together import wait_for_all

SCRIPT = """
import time
from pathlib import Path
from skink.compression.together import wait_for_all
from skink.settings import settings

first = Path({folder!r}) / "first"
if settings().main_process:
    time.sleep(0.5)
    first.touch()
wait_for_all()
assert first.exists()
wait_for_all()
(Path({folder!r}) / f"done-{{settings().process}}").touch()
"""


def test_one_process_does_not_wait(set_environment: Callable[..., None]) -> None:
    set_environment(WORLD_SIZE="")
    wait_for_all()


def test_nobody_goes_on_before_the_last_is_there(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # As torchrun starts them.
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            [sys.executable, str(script)], env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=200) for process in running] == [0, 0]
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
