"""One of the processes that tests train with.

python -m tests.training.loop.worker train FOLDER CASE...     each case twice, those of students once, with the programs
                                                              of `write_programs`; writes CASE-i.json and
                                                              CASE-i.safetensors
python -m tests.training.loop.worker die FOLDER CASE step N   killed when N steps of it are made
python -m tests.training.loop.worker die FOLDER CASE flush N  killed when a checkpoint is written, at the Nth flush
"""

import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from skink.graph.calibration import token_batches
from skink.graph.program import Program
from skink.graph.propagate import refresh
from skink.graph.serialization import load_graph, program_to_json
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


def run_student(case: str, program: Program, original: Program) -> tuple[TrainingRecord, nn.Module]:
    """Train a program against what it was, with sharded weights."""
    adapters, precision = STUDENTS[case]
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


def write_programs(folder: Path, *programs: Program) -> None:
    """Keep programs for the processes, which need not load transformers and capture a model each."""
    for index, program in enumerate(programs):
        (folder / f"program-{index}.json").write_text(json.dumps(program_to_json(program)))
        save_file({name: entry.contiguous() for name, entry in program.weights()}, folder / f"program-{index}.weights")


def _read_program(folder: Path, index: int) -> Program:
    weights = load_file(folder / f"program-{index}.weights")
    program = load_graph((folder / f"program-{index}.json").read_text(), weights)
    refresh(program)
    return program


def _train(folder: Path, *cases: str) -> None:
    for case in cases:
        found: dict[str, object] = {}
        if case in STUDENTS:
            record, module = run_student(case, _read_program(folder, 0), _read_program(folder, 1))
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
