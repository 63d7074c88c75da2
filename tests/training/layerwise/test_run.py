import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from skink.graph.windows import Windows
from skink.training.layerwise import run as layer_run
from skink.training.layerwise.layer import Layer
from skink.training.layerwise.match_layers import match_layers
from skink.training.loop.options import TrainOptions
from skink.training.losses.objectives import Terms
from tests.training.layerwise import layer_worker

HIDDEN = Terms(hidden=1.0)


def text(windows: int = 6, length: int = 5) -> Windows:
    return Windows(torch.randint(13, (windows, length), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("at_once", "alive"), [(1, 1), (2, 2), (0, 3)])
def test_only_one_group_s_weights_are_held(at_once: int, alive: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0

    class Watched(Layer):
        def __init__(self, *given: Any) -> None:
            nonlocal most
            super().__init__(*given)
            made.append(weakref.ref(next(iter(self.weights.values()))))
            most = max(most, sum(entry() is not None for entry in made))

    monkeypatch.setattr(layer_run, "Layer", Watched)
    original, program = layer_worker.programs()
    options = TrainOptions(steps=2, batch=4)
    match_layers(original, program, text(), options, terms=HIDDEN, train="all", layers_at_once=at_once)
    assert len(made) == 3
    assert most == alive
    assert not any(entry() is not None for entry in made)


def test_progress_leaves_out_what_was_done_before(tmp_path: Path) -> None:
    original, program = layer_worker.programs()
    options = TrainOptions(steps=3, batch=4, micro_batch=2)
    totals = []
    for _ in range(2):
        seen: list[tuple[int, int]] = []
        match_layers(
            original,
            program.clone(),
            text(),
            options,
            terms=HIDDEN,
            train="all",
            checkpoints=tmp_path,
            identity="abc",
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )
        assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
        totals.append(len(seen))
    # Three readings on the way to the third layer; for each layer two measurements, and steps of two micro-batches.
    assert totals == [3 * 3 + 3 * (2 * 3 + 3 * 2), 3 * 3]


def test_each_layer_has_its_checkpoint(tmp_path: Path) -> None:
    original, program = layer_worker.programs()
    given: dict[str, Any] = {"terms": HIDDEN, "train": "all", "checkpoints": tmp_path, "identity": "0123456789abcdef"}
    match_layers(original, program, text(), TrainOptions(steps=1, batch=4), **given)
    assert sorted(path.name for path in (tmp_path / "recover-0123456789ab").iterdir()) == [
        "layer-0000",
        "layer-0001",
        "layer-0002",
    ]


def test_the_text_need_not_fit_in_memory_as_one_tensor() -> None:
    # Windows may be mapped from a file: they are only ever indexed.
    class Rows:
        """Tokens that nobody may ask for all at once."""

        def __init__(self, tokens: torch.Tensor) -> None:
            self._tokens, self.shape = tokens, tokens.shape

        def __len__(self) -> int:
            return len(self._tokens)

        def numel(self) -> int:
            return self._tokens.numel()

        def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
            assert len(rows) <= 2
            return self._tokens[rows]

    original, program = layer_worker.programs()
    windows = Windows(Rows(text().tokens))  # type: ignore[arg-type]
    options = TrainOptions(batch=4, micro_batch=2)
    assert len(match_layers(original, program, windows, options, terms=HIDDEN, train="all").layers) == 3
