"""One of the processes that tests train with.

python -m tests.training.loop.worker train FOLDER CASE...     each case twice; writes CASE-i.json and CASE-i.safetensors
python -m tests.training.loop.worker students FOLDER CASE...  the same for students, once
python -m tests.training.loop.worker die FOLDER CASE step N   killed when N steps of it are made
python -m tests.training.loop.worker die FOLDER CASE flush N  killed when a checkpoint is written, at the Nth flush
"""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import nn

from skink.graph.calibration import token_batches
from skink.graph.windows import Windows
from skink.training.loop import checkpoint
from skink.training.loop.options import Precision, TrainingRecord, TrainOptions
from skink.training.loop.trainer import train
from skink.training.losses.objectives import Terms
from skink.training.losses.student import Student
from skink.training.weights.adapters import LoraOptions, add_adapters
from skink.training.weights.trainable import choose_trainable
from tests.training.loop.tiny_training import Next, make_inputs, next_module, text

_COMMON: dict[str, Any] = {"learning_rate": 3e-2, "weight_decay": 0.1, "evaluate_every": 60, "checkpoint_every": 1}

# Name → options of training, of the module, of the text.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({"steps": 7, "batch": 6}, {}, {}),
    # Five windows over two processes in micro-batches of two; 23 windows, so that the last step has three.
    "uneven": ({"batch": 5, "micro_batch": 2}, {}, {"windows": 23, "padded": True}),
    "one-window": ({"steps": 3, "batch": 1}, {}, {}),
    "sharded": ({"batch": 5, "micro_batch": 2, "sharding": "full"}, {}, {"windows": 23, "padded": True}),
    "sharded-tied": ({"steps": 5, "batch": 4, "sharding": "full"}, {"tied": True}, {}),
    "sharded-half": ({"steps": 5, "batch": 4, "sharding": "full", "precision": "bfloat16"}, {}, {}),
    # Everything that a resumed run has to find again: dropout, the best weights, accumulation.
    "killed": (
        {
            "steps": 12,
            "batch": 4,
            "micro_batch": 3,
            "learning_rate": 0.5,
            "clip": 0.0,
            "evaluate_every": 20,
            "schedule": "constant",
        },
        {"dropout": 0.3},
        {"padded": True},
    ),
}


def run(case: str, folder: Path | None = None, **more: Any) -> tuple[TrainingRecord, Next]:
    """Train a case in this process; further options as of `train`."""
    options, of_module, of_text = CASES[case]
    module = next_module(**of_module)
    record = train(
        module,
        text(**of_text),
        TrainOptions(**_COMMON | options),
        make_inputs=make_inputs,
        held_out=text(7, seed=1),
        checkpoints=folder,
        **more,
    )
    return record, module


# Name → whether adapters train, and the student's precision; weights are stored in half precision where it is not full.
STUDENTS: dict[str, tuple[bool, Precision]] = {
    "student": (False, "float32"),
    "student-adapters": (True, "bfloat16"),
}


def run_student(case: str) -> tuple[TrainingRecord, nn.Module]:
    """Train a factored tiny model against what it was, with sharded weights."""
    # Only here: a process that trains no student, and is killed, need not load transformers first.
    from tests.training.students import factored

    adapters, precision = STUDENTS[case]
    program, original = factored()
    if precision != "float32":
        program, original = program.with_dtype(torch.float16), original.with_dtype(torch.float16)
    student = Student(program, original, Terms(ce=1.0, kl=0.5), precision=precision, checkpointing=not adapters)
    if adapters:
        student.model.requires_grad_(False)
        add_adapters(student.model, LoraOptions(rank=2), program, seed=0)
    else:
        # Norms among them, which the graph reads by itself, and reads again when it computes anew.
        choose_trainable(student.model, program, original, "all")
    windows = torch.randint(60, (10, 8), generator=torch.Generator().manual_seed(0))
    options = TrainOptions(steps=2, batch=5, micro_batch=2, learning_rate=1e-3, precision=precision, sharding="full")
    record = train(
        student,
        Windows(windows),
        options,
        make_inputs=lambda tokens, padding: token_batches(program, tokens, batch=len(tokens), padding=padding)[0],
    )
    return record, student


def two_processes(folder: Path, *cases: str) -> None:
    """Run cases in two new processes that train together, as `torchrun` starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    children = [
        start(["train", str(folder), *cases], **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)
    ]
    said = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(said)


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """This file as a process of its own, in which warnings are errors."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.training.loop.worker", *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _train(folder: Path, *cases: str) -> None:
    for case in cases:
        found: dict[str, object] = {}
        if case in STUDENTS:
            record, module = run_student(case)
        else:
            record, module = run(case, folder / "checkpoints" / case)
            # The second run goes on from the last checkpoint but one.
            if torch.distributed.get_rank() == 0:
                *_, last = sorted((folder / "checkpoints" / case).glob("*/step-*"))
                shutil.rmtree(last)
            torch.distributed.barrier()
            again, same = run(case, folder / "checkpoints" / case)
            plain = next_module(**CASES[case][1])
            found = {
                "again": again.as_dict(),
                "same": all(torch.equal(a, b) for a, b in zip(module.parameters(), same.parameters(), strict=True)),
                "types": [type(a) is type(b) for a, b in zip(module.modules(), plain.modules(), strict=True)],
                "loss": module(**make_inputs(text(3).tokens, None))["loss"].item(),
            }
        name = f"{case}-{torch.distributed.get_rank()}"
        (folder / f"{name}.json").write_text(json.dumps({**found, "record": record.as_dict()}))
        weights = {key: entry.detach().clone() for key, entry in module.named_parameters() if entry.requires_grad}
        save_file(weights, folder / f"{name}.safetensors")


def _die(folder: Path, case: str, where: str, number: str) -> None:
    count = itertools.count(1)

    def die(*ignored: object) -> None:
        if next(count) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    flush: Callable[[Path], None] = checkpoint._flush
    if where == "flush":
        with patch.object(checkpoint, "_flush", lambda path: (die(), flush(path))):
            run(case, folder)
    else:
        run(case, folder, status=die)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, place, *rest = sys.argv[1:]
    {"train": _train, "die": _die}[command](Path(place), *rest)
