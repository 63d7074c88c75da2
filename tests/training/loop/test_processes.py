"""Two processes train as one does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState, is_initialized
from safetensors.torch import load_file

from skink.training.loop.processes import processes, wait_for_all
from tests.training.loop import worker
from tests.training.processes import two
from tests.training.students import factored

CASES = ("plain", "uneven", "one-window", "sharded", "sharded-tied", "sharded-half")

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# In bfloat16 a sum in another order can change a product in the last of its eight bits.
ROUGH = {"rtol": 1e-2, "atol": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left, which trained all cases."""
    folder = tmp_path_factory.mktemp("two")
    worker.write_programs(folder, *factored())
    two("-m", "tests.training.loop.worker", "train", str(folder), *CASES, *worker.STUDENTS)
    return folder


def results(folder: Path, case: str) -> list[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    return [
        (json.loads((folder / f"{case}-{rank}.json").read_text()), load_file(folder / f"{case}-{rank}.safetensors"))
        for rank in (0, 1)
    ]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_losses_and_weights_of_one(case: str, folder: Path) -> None:
    record, module = worker.run(case)
    tolerance = ROUGH if case == "sharded-half" else CLOSE
    for found, weights in results(folder, case):
        two = found["record"]
        assert (two["processes"], two["steps"], two["tokens"]) == (2, record.steps, record.tokens)
        for kind in ("losses", "held_out"):
            torch.testing.assert_close(torch.tensor(two[kind]), torch.tensor(getattr(record, kind)), **tolerance)
        torch.testing.assert_close(torch.tensor(two["terms"]["ce"]), torch.tensor(record.terms["ce"]), **tolerance)
        torch.testing.assert_close(
            weights, {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}, **tolerance
        )


@pytest.mark.parametrize("case", CASES)
def test_both_processes_end_with_the_same_whole_module(case: str, folder: Path) -> None:
    (first, weights), (second, others) = results(folder, case)
    assert first["record"]["losses"] == second["record"]["losses"]
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    # Nothing that spread the weights is left on the modules, and they run.
    assert all(first["types"])
    assert first["loss"] == second["loss"] > 0


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_from_its_checkpoint(case: str, folder: Path) -> None:
    for found, _ in results(folder, case):
        assert found["same"]
        assert found["again"]["resumed_at"] == found["record"]["steps"] - 1
        for kind in ("losses", "terms", "held_out", "best"):
            assert found["again"][kind] == found["record"][kind]


@pytest.mark.parametrize("case", worker.STUDENTS)
def test_programs_train_with_sharded_weights_as_in_one_process(case: str, folder: Path) -> None:
    record, student = worker.run_student(case, *factored())
    expected = {name: entry.detach() for name, entry in student.named_parameters() if entry.requires_grad}
    half = worker.STUDENTS[case][1] != "float32"
    for found, weights in results(folder, case):
        two, one = torch.tensor(found["record"]["losses"]), torch.tensor(record.losses)
        torch.testing.assert_close(two, one, **(ROUGH if half else CLOSE))
        assert weights.keys() == expected.keys()
        if not half:
            torch.testing.assert_close(weights, expected, **CLOSE)


def test_sharded_weights_and_optimizer_state_are_spread(folder: Path) -> None:
    [last] = (folder / "checkpoints" / "sharded").glob("*/step-00000005")
    parts = [load_file(last / f"process-{rank}.safetensors") for rank in (0, 1)]
    shapes = {name: entry.shape for name, entry in worker.next_module().named_parameters() if name[:6] != "frozen"}
    for kind in ("weight", "best", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
        for name, shape in shapes.items():
            rows = [part[f"{kind}/{name}"].shape[0] for part in parts]
            assert rows == [-(-shape[0] // 2), shape[0] // 2]


def test_unsharded_weights_are_written_once(folder: Path) -> None:
    [last] = (folder / "checkpoints" / "plain").glob("*/step-00000007")
    assert list(load_file(last / "process-1.safetensors")) == ["random/cpu"]


def test_one_process_alone() -> None:
    with processes(torch.device("cpu"), "full") as group:
        assert (group.index, group.count, group.main, group.sharded) == (0, 1, True, False)
        assert group.device.type == "cpu"
        assert [part.tolist() for part in group.share(torch.arange(5), 2)] == [[0, 1], [2, 3], [4]]
        assert [part.tolist() for part in group.share(torch.arange(5), 0)] == [[0, 1, 2, 3, 4]]
        assert group.first("this") == "this"
        assert group.sum(torch.tensor(3)).item() == 3


def test_accelerate_forgets_what_it_was_not_asked_by_the_user() -> None:
    # Tests before this one may have trained by other means.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    assert not is_initialized()
    with processes(torch.device("cpu"), "none"):
        assert is_initialized()
    assert not PartialState._shared_state
    own = Accelerator(mixed_precision="bf16", cpu=True)
    try:
        with processes(torch.device("cpu"), "none") as group:
            assert group.count == 1
        assert own.mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


_MEETING = """
import time
from pathlib import Path
from skink.training.loop.processes import wait_for_all
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


def test_one_process_waits_for_nobody(set_environment: Callable[..., None]) -> None:
    set_environment(WORLD_SIZE="")
    wait_for_all()


def test_nobody_goes_on_before_the_last_is_there(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_MEETING.format(folder=str(tmp_path)))
    two(str(script))
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
