"""A tiny random Llama with the tokenizer that ships, saved once, and ways to run the command line on it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from skink.cli import app

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "skink" / "assets" / "stdlib-llama"


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """All of stdout, as one JSON value."""
        return json.loads(self.stdout)


Run = Callable[..., Ran]


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs a command in this process."""

    def invoke(*arguments: object) -> Ran:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return Ran(result.exit_code, result.stdout, result.stderr)

    return invoke


@pytest.fixture(scope="session")
def run_fresh() -> Run:
    """Runs a command in a process of its own."""

    def start(*arguments: object) -> Ran:
        command = [sys.executable, "-m", "skink", *(str(argument) for argument in arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False)
        return Ran(done.returncode, done.stdout, done.stderr)

    return start


def environment() -> dict[str, str]:
    """For processes of their own: one thread, no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def save_tiny(folder: Path, **options: Any) -> Path:
    """A tiny random Llama with a tokenizer, as a checkpoint."""
    values: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**values | options)).eval()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all processes of this test run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "cli"
    folder.mkdir(exist_ok=True)
    return folder


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, made by the first process that asks for it."""
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            make(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(shared: Path) -> Path:
    """The checkpoint that all tests share; nothing may change it."""
    return once(shared / "tiny", save_tiny)


@pytest.fixture(scope="session")
def compressed(tiny: Path, run: Run, shared: Path) -> Path:
    """The tiny model after low rank, as a Skink folder with ONNX in it, without measurements."""

    def make(out: Path) -> None:
        recipe = "low-rank{keep=0.5,method=plain}"
        done = run("compress", tiny, "--recipe", recipe, "--out", out, "--no-evaluate", "--onnx", "--verify", 0)
        if done.code != 0:
            pytest.fail(done.stderr)

    return once(shared / "small", make)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of text, enough for some windows of 32 tokens."""
    path = tmp_path / "text.py"
    path.write_text("".join(f"def function_{i}(x):\n    return x + {i}\n\n\n" for i in range(200)), encoding="utf-8")
    return path
