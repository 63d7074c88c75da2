"""Runs that end early, that go on, and that several processes share."""

import tempfile
from pathlib import Path

import pytest
import torch

from skink.errors import RecoveryError
from tests.training.layerwise import layer_worker
from tests.training.layerwise.factored import BOTH, match, same
from tests.training.processes import two


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_behind_by_an_error(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise error

    with pytest.raises(error):
        match(held_bytes=0, progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_killed_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    whole, program = match(terms=BOTH)

    def stop(said: str) -> None:
        if said.startswith("model.layers.1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        match(terms=BOTH, checkpoints=tmp_path, identity="abc", status=stop)
    record, other = match(terms=BOTH, checkpoints=tmp_path, identity="abc")
    assert record.layers_resumed == 1
    assert (record.losses, record.terms, record.layers) == (whole.losses, whole.terms, whole.layers)
    assert same(program, other)
    again, other = match(terms=BOTH, checkpoints=tmp_path, identity="abc", layers_at_once=2)
    assert again.layers_resumed == 2
    assert same(program, other)


def test_a_damaged_checkpoint_is_said(tmp_path: Path) -> None:
    match(checkpoints=tmp_path, identity="abc")
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RecoveryError) as caught:
        match(checkpoints=tmp_path, identity="abc")
    assert caught.value.code == "RECOVER-004"


def test_checkpoints_need_an_identity(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="identity"):
        match(checkpoints=tmp_path)


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    two("-m", "tests.training.layerwise.layer_worker", str(tmp_path))
    record, program = layer_worker.run()
    expected = {**record.as_dict(), "seconds": 0.0, "processes": 2}
    assert len(record.layers) == 3
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["record"] == expected
        assert all(torch.equal(program.weight(name), tensor) for name, tensor in found["weights"].items())
