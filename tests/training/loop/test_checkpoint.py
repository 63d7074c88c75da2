import json
import shutil
from pathlib import Path

import pytest
import torch

from skink.errors import OutputError, RecoveryError
from skink.training.loop.checkpoint import at, newest, read_tensors, write


def written(folder: Path, *steps: int, identity: str = "run") -> Path:
    for step in steps:
        tensors = {"weight/a": torch.full((3,), float(step)), "optimizer/step/a": torch.tensor(float(step))}
        write(folder, step=step, identity=identity, state={"loss": 1 / 3}, tensors=tensors)
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def turn_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    found = newest(written(tmp_path, 4), "run")
    assert found is not None
    assert (found.step, found.state, found.passed_over) == (4, {"loss": 1 / 3}, ())
    tensors = read_tensors(found.folder, 0)
    assert tensors["weight/a"].tolist() == [4.0, 4.0, 4.0]
    assert tensors["optimizer/step/a"].item() == 4.0
    assert at(tmp_path, 4).state == found.state
    assert read_tensors(found.folder, 1) == {}


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    written(tmp_path, 2, 9, 10, 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def test_none_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere", "run") is None


def test_a_half_written_one_counts_for_nothing_and_goes(tmp_path: Path) -> None:
    shutil.copytree(written(tmp_path, 5) / "step-00000005", tmp_path / "step-00000006.partial")
    found = newest(tmp_path, "run")
    assert found is not None
    assert (found.step, found.passed_over) == (5, ())
    written(tmp_path, 7)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: cut(path / "process-0.safetensors"), "process-0.safetensors is damaged"),
        (lambda path: turn_a_bit(path / "process-0.safetensors"), "process-0.safetensors is damaged"),
        (lambda path: (path / "process-0.safetensors").unlink(), "No such file"),
        (lambda path: cut(path / "checkpoint.json"), "checkpoint.json is damaged"),
        (lambda path: (path / "checkpoint.json").write_bytes(b"\xff"), "checkpoint.json is damaged"),
        (lambda path: (path / "checkpoint.json").write_text("[]"), "not of format 1"),
        (lambda path: (path / "checkpoint.json").write_text('{"format": 1}'), "checkpoint.json is damaged"),
    ],
)
def test_a_damaged_one_is_passed_over_with_the_reason(damage, reason: str, tmp_path: Path) -> None:
    damage(written(tmp_path, 5, 8) / "step-00000008")
    found = newest(tmp_path, "run")
    assert found is not None
    assert found.step == 5
    [passed_over] = found.passed_over
    assert passed_over.startswith("step-00000008: ")
    assert reason in passed_over
    # The run comes to that step again, and writes it anew.
    assert newest(written(tmp_path, 8), "run").step == 8


def test_where_none_can_be_used_each_says_why(tmp_path: Path) -> None:
    written(tmp_path, 5, identity="other")
    cut(written(tmp_path, 8) / "step-00000008" / "process-0.safetensors")
    with pytest.raises(RecoveryError) as caught:
        newest(tmp_path, "run")
    assert caught.value.code == "RECOVER-004"
    assert "step-00000008: process-0.safetensors is damaged" in caught.value.why
    assert "step-00000005: it belongs to a run with other options" in caught.value.why


def test_one_that_this_run_cannot_use_is_passed_over(tmp_path: Path) -> None:
    with pytest.raises(RecoveryError, match="it is of another world"):
        newest(written(tmp_path, 5), "run", lambda state: "it is of another world")


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as caught:
        written(tmp_path / "file" / "folder", 1)
    assert caught.value.code == "OUTPUT-002"


def test_files_of_all_processes_are_checked(tmp_path: Path) -> None:
    """Two processes, one after the other: the second has written its file when the first comes to the end."""

    def other(folder: Path = tmp_path / "step-00000003.partial") -> None:
        if folder.exists() and not (folder / "process-1.safetensors").exists():
            shutil.copy(
                written(tmp_path / "b", 1) / "step-00000001/process-0.safetensors", folder / "process-1.safetensors"
            )

    write(tmp_path, step=3, identity="run", state={}, tensors={"a": torch.ones(2)}, wait=other)
    facts = json.loads((tmp_path / "step-00000003/checkpoint.json").read_text())
    assert list(facts["files"]) == ["process-0.safetensors", "process-1.safetensors"]
    cut(tmp_path / "step-00000003/process-1.safetensors")
    with pytest.raises(RecoveryError, match=r"process-1\.safetensors is damaged"):
        newest(tmp_path, "run")
