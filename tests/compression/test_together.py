"""Processes meet; tests/cli/test_compress_training.py has two that train."""

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
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
