import dataclasses

import pytest

from skink.training.layerwise.pieces import Cut, Piece
from skink.training.layerwise.record import LayerLoss, Outcome, record_of
from skink.training.loop.options import TrainOptions


def piece(index: int) -> Piece:
    cut = Cut("", "", (), ())
    return Piece(index, f"layers.{index}", cut, cut, (f"layers.{index}.weight",))


def test_a_record_is_the_mean_over_layers() -> None:
    outcomes = [
        (piece(0), Outcome(0.5, 0.25, 2.0, [[0.4, 0.2], [0.2, 0.1]])),
        (piece(2), Outcome(1.0, 0.5, 3.0, [[0.8, 0.0], [0.4, 0.1]])),
    ]
    options = TrainOptions(steps=2)
    record = record_of(outcomes, [30, 55], (1.0, 10.0), options, processes=3, resumed=1)
    assert (record.steps, record.tokens, record.seconds, record.processes) == (2, 55, 5.0, 3)
    assert [tokens for tokens, _ in record.losses] == [30, 55]
    assert [loss for _, loss in record.losses] == pytest.approx([0.6 + 10 * 0.1, 0.3 + 10 * 0.1])
    assert record.terms["hidden"] == pytest.approx((0.6, 0.3))
    assert record.terms["attention"] == pytest.approx((0.1, 0.1))
    assert record.layers == (LayerLoss("layers.0", 0.5, 0.25), LayerLoss("layers.2", 1.0, 0.5))
    assert record.trained == ("layers.0.weight", "layers.2.weight")
    assert record.layers_resumed == 1
    assert record.as_dict() == dataclasses.asdict(record)


def test_terms_without_weight_are_left_out() -> None:
    record = record_of(
        [(piece(0), Outcome(0, 0, 0, [[0.4, 0.0]]))], [30], (2.0, 0.0), TrainOptions(), processes=1, resumed=0
    )
    assert record.terms == {"hidden": pytest.approx((0.4,))}
    assert record.losses == ((30, pytest.approx(0.8)),)
