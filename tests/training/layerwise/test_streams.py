import tempfile
from pathlib import Path

import pytest
import torch

from skink.errors import OutputError
from skink.training.layerwise import streams as module
from skink.training.layerwise.streams import Streams


def values(windows: int) -> list[torch.Tensor]:
    return [torch.arange(windows * 6.0).view(windows, 2, 3), torch.arange(windows).view(windows, 1)]


def fill(held: Streams, given: list[torch.Tensor]) -> None:
    for rows in torch.arange(len(given[0])).split(2):
        held.write(rows, [value[rows] for value in given])
    held.advance()


@pytest.mark.parametrize("limit", [2**20, 0])
def test_what_is_written_is_read_after_the_next_step(limit: int) -> None:
    held, given = Streams(5, limit), values(5)
    assert held.read(torch.tensor([1])) == []
    fill(held, given)
    rows = torch.tensor([4, 0, 3])
    for found, expected in zip(held.read(rows), given, strict=True):
        assert torch.equal(found, expected[rows])
    # In place: each row is read before it is written.
    for rows in torch.arange(5).split(2):
        held.write(rows, [value + 1 for value in held.read(rows)])
    held.advance()
    assert torch.equal(held.read(torch.arange(5))[0], given[0] + 1)


def test_values_of_another_shape_take_another_place() -> None:
    held = Streams(4, 2**20)
    fill(held, [torch.ones(4, 3)])
    for rows in torch.arange(4).split(2):
        held.write(rows, [torch.cat([value, value], 1) for value in held.read(rows)])
    held.advance()
    assert torch.equal(held.read(torch.arange(4))[0], torch.ones(4, 6))


def test_what_is_read_is_a_copy() -> None:
    held = Streams(2, 2**20)
    fill(held, [torch.ones(2, 3)])
    held.read(torch.arange(2))[0].zero_()
    assert torch.equal(held.read(torch.arange(2))[0], torch.ones(2, 3))


def test_beyond_the_limit_files_are_mapped_and_leave_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mapped = []
    monkeypatch.setattr(module, "_mapped", lambda *given, make=module._mapped: mapped.append(given) or make(*given))
    held = Streams(4, 4 * 3 * 4)
    fill(held, [torch.ones(4, 3), torch.ones(4, 5)])
    assert [shape for shape, _, _ in mapped] == [(4, 5)]
    # The same shapes again need no other place.
    for rows in torch.arange(4).split(2):
        held.write(rows, held.read(rows))
    held.advance()
    assert len(mapped) == 1
    assert not list(tmp_path.iterdir())


def test_no_space_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="no space for 0 MiB of values between layers") as caught:
        fill(Streams(4, 0), [torch.ones(4, 3)])
    assert caught.value.code == "OUTPUT-002"
    assert "No space left on device" in caught.value.why


def test_files_are_mapped_where_space_cannot_be_taken_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on macOS and Windows.
    monkeypatch.delattr(module.os, "posix_fallocate")
    held = Streams(4, 0)
    fill(held, [torch.ones(4, 3)])
    assert torch.equal(held.read(torch.arange(4))[0], torch.ones(4, 3))
