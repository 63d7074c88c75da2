import json

import pytest

from skink.errors import OptionError
from skink.training.loop.options import TrainingRecord, TrainOptions


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 0},
        {"steps": 0},
        {"tokens": 5, "steps": 5},
        {"batch": 0},
        {"micro_batch": -1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"warmup": 1.5},
        {"final": -0.1},
        {"weight_decay": -1.0},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"epsilon": 0.0},
        {"clip": -1.0},
        {"evaluate_every": -1},
        {"patience": -1},
        {"checkpoint_every": 0},
        {"seed": 2**32},
    ],
    ids=str,
)
def test_a_value_out_of_its_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError) as caught:
        TrainOptions(**wrong)
    assert caught.value.code == "OPTION-002"
    assert next(iter(wrong)) in caught.value.what


def test_options_and_records_are_plain_data() -> None:
    assert json.loads(json.dumps(TrainOptions(steps=3).as_dict()))["steps"] == 3
    record = TrainingRecord(steps=1, tokens=2, seconds=0.5, losses=((2, 1.0),), terms={"ce": (1.0,)})
    assert json.loads(json.dumps(record.as_dict()))["losses"] == [[2, 1.0]]
