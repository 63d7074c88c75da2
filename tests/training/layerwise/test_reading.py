from typing import Any

import pytest
import torch

from skink.graph.windows import Windows
from skink.training.layerwise import reading
from skink.training.layerwise.reading import Reading
from skink.training.loop.options import TrainOptions
from skink.training.loop.order import Order
from tests.programs import canonical

LENGTH = 5


def text(windows: int = 20, *, padded: bool = False) -> Windows:
    tokens = torch.randint(97, (windows, LENGTH), generator=torch.Generator().manual_seed(0))
    padding = None
    if padded:
        padding = torch.ones_like(tokens)
        padding[::2, 0] = 0
    return Windows(tokens, padding=padding)


def reader(windows: Windows, **options: Any) -> Reading:
    return Reading(canonical("llama"), windows, TrainOptions(**{"batch": 4, **options}))


def read(entry: Reading, rows: torch.Tensor) -> torch.Tensor:
    """The tokens that programs are given."""
    tokens: torch.Tensor = entry.inputs(rows)[0]["input_ids"]
    return tokens


def test_steps_read_the_windows_of_the_order_and_no_others_count() -> None:
    windows = text()
    entry = reader(windows, tokens=35, seed=3)
    order = Order(20, 3).rows(0, 7)
    assert (entry.steps, entry.count) == (2, 7)
    for step, rows in enumerate((order[:4], order[4:])):
        assert torch.equal(read(entry, entry.step(step)), windows.tokens[rows])
    assert torch.equal(read(entry, entry.all()), windows.tokens[order.sort().values])


def test_a_text_that_is_read_several_times_is_there_once() -> None:
    windows = text(3)
    entry = reader(windows, steps=2)
    assert entry.count == 3
    assert torch.equal(read(entry, entry.all()), windows.tokens)
    order = Order(3, 0).rows(0, 8)
    assert [entry.step(0).tolist(), entry.step(1).tolist()] == [order[:4].tolist(), order[4:].tolist()]


def test_the_sample_is_spread_over_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = reader(text(6))
    assert entry.sample().tolist() == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(reading, "_MEASURED", 3 * LENGTH)
    assert entry.sample().tolist() == [0, 2, 5]
    # One window at least, however long it is.
    monkeypatch.setattr(reading, "_MEASURED", 1)
    assert entry.sample().tolist() == [0]


def test_padding_is_no_text() -> None:
    entry, whole = reader(text(padded=True)), reader(text())
    rows = torch.tensor([0, 1, 2])
    assert (entry.tokens(rows), whole.tokens(rows)) == (3 * LENGTH - 2, 3 * LENGTH)
    real = entry.inputs(rows)[1]
    assert real is not None
    assert real.sum(1).tolist() == [LENGTH - 1, LENGTH, LENGTH - 1]
    assert whole.inputs(rows)[1] is None


@pytest.mark.parametrize(("micro_batch", "size", "parts"), [(0, 4, 2), (3, 3, 2), (8, 8, 1)])
def test_rows_go_in_micro_batches(micro_batch: int, size: int, parts: int) -> None:
    entry = reader(text(), micro_batch=micro_batch)
    assert (entry.size, entry.parts(torch.arange(6))) == (size, parts)
