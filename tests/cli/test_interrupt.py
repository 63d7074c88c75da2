"""Ctrl-C in the middle of the main job, in a process of its own."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT, environment

# A shell without job control starts background jobs with Ctrl-C ignored, and a test run may be one.
START = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from skink.cli import main; main()"
PATIENCE = 300.0


@pytest.mark.parametrize(
    ("number", "code", "moment"),
    [(signal.SIGINT, 130, "low-rank: done"), (signal.SIGTERM, 143, "the folder is there")],
)
def test_leaves_no_folder(tiny: Path, tmp_path: Path, number: signal.Signals, code: int, moment: str) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    arguments = ["compress", str(tiny), "--recipe", "low-rank{method=plain}", "--out", str(outputs / "out")]
    # So many rounds that it does not end by itself.
    command = [sys.executable, "-c", START, *arguments, "--rounds", "1000000", "--prompt-tokens", "8"]
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment())
    try:
        deadline = time.monotonic() + PATIENCE
        while not _reached(moment, outputs, tmp_path / "stderr"):
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(PATIENCE) == code
    finally:
        process.kill()
        process.wait()
    assert list(outputs.iterdir()) == []
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def _reached(moment: str, outputs: Path, stderr: Path) -> bool:
    return any(outputs.iterdir()) and (moment == "the folder is there" or moment in stderr.read_text())
