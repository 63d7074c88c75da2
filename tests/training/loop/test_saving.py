"""A run that is killed goes on as if nothing had been."""

import dataclasses
import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from skink.errors import RecoveryError
from skink.training.loop.options import TrainingRecord, TrainOptions
from skink.training.loop.saving import run_identity
from tests.training.loop import worker
from tests.training.loop.tiny_training import Next, next_module, text
from tests.training.processes import start

STEPS = 12


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[TrainingRecord, Next]:
    record, module = worker.run("killed")
    # The best weights are not the last: a run that goes on has to find them in the checkpoint.
    assert record.best is not None
    assert 0 < record.best[0] < record.losses[-3][0]
    return record, module


def same(found: tuple[TrainingRecord, Next], expected: tuple[TrainingRecord, Next]) -> bool:
    """Whether records say the same, and weights are the same bit for bit."""
    plain = [dataclasses.replace(record, seconds=0.0, resumed_at=None, notes=()) for record in (found[0], expected[0])]
    pairs = zip(found[1].state_dict().values(), expected[1].state_dict().values(), strict=True)
    return plain[0] == plain[1] and all(torch.equal(a, b) for a, b in pairs)


def killed(folder: Path, where: str, number: int) -> None:
    child = start("-m", "tests.training.loop.worker", "die", str(folder), "killed", where, str(number))
    said = child.communicate(timeout=120)[0]
    assert child.returncode == -signal.SIGKILL, f"{where} {number}: {said}"


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("*/step-????????"))


def test_killed_at_any_step_and_while_writing_it_ends_with_the_same_bits(
    tmp_path: Path, uninterrupted: tuple[TrainingRecord, Next]
) -> None:
    torch.set_num_threads(1)
    at_step, at_flush = random.randint(4, STEPS - 4), random.randint(1, 4)
    killed(tmp_path, "step", at_step)
    reached = max(steps(tmp_path))
    assert 0 < reached <= at_step
    # The first checkpoint of the second process is cut off at one of its flushes; the last comes after the renaming.
    killed(tmp_path, "flush", at_flush)
    [run] = tmp_path.iterdir()
    assert (len(list(run.glob("*.partial"))) == 1) == (at_flush < 4)
    whole = max(steps(tmp_path))
    assert (whole > reached) == (at_flush == 4)
    found = worker.run("killed", tmp_path)
    assert found[0].resumed_at == whole
    assert same(found, uninterrupted), (at_step, at_flush)
    assert not list(run.glob("*.partial"))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    worker.run("killed", tmp_path)
    [run] = tmp_path.iterdir()
    return run


def test_checkpoints_change_nothing(finished: Path, uninterrupted: tuple[TrainingRecord, Next]) -> None:
    found = worker.run("killed", finished.parent)
    assert found[0].resumed_at == STEPS
    assert same(found, uninterrupted)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    finished: Path, uninterrupted: tuple[TrainingRecord, Next]
) -> None:
    before, last = steps(finished.parent)
    file = finished / f"step-{last:08d}" / "process-0.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    found = worker.run("killed", finished.parent)
    assert found[0].resumed_at == before
    [note] = found[0].notes
    assert note.startswith(f"checkpoint step-{last:08d}: process-0.safetensors is damaged")
    assert note.endswith(f"went on from step-{before:08d}.")
    assert same(found, uninterrupted)


def test_where_no_checkpoint_can_be_read_the_run_says_so(finished: Path) -> None:
    for path in finished.glob("step-*/checkpoint.json"):
        path.write_text("{")
    with pytest.raises(RecoveryError) as caught:
        worker.run("killed", finished.parent)
    assert caught.value.code == "RECOVER-004"


def test_sharded_checkpoints_are_not_taken_by_a_run_that_is_not(finished: Path) -> None:
    for path in finished.glob("step-*/checkpoint.json"):
        facts = json.loads(path.read_text())
        facts["state"]["sharded"] = True
        path.write_text(json.dumps(facts))
    with pytest.raises(RecoveryError, match="its weights are sharded"):
        worker.run("killed", finished.parent)


def test_runs_that_differ_have_folders_of_their_own(finished: Path) -> None:
    shutil.rmtree(finished / f"step-{STEPS:08d}")
    record, _ = worker.run("plain", finished.parent)
    assert record.resumed_at is None
    assert len(list(finished.parent.iterdir())) == 2


def test_runs_on_other_frozen_weights_are_other_runs() -> None:
    modules = [next_module() for _ in range(4)]
    modules[1].frozen.weight.data[0, 0] += 1
    modules[2].frozen.requires_grad_(True)
    modules[3].frozen.bfloat16()
    found = [run_identity(module, [text(), None], TrainOptions()) for module in modules]
    assert len(set(found)) == 4
    assert found[0] == run_identity(next_module(), [text(), None], TrainOptions())
