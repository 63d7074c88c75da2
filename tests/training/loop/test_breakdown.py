from typing import Any

import pytest
import torch

from skink.training.loop.breakdown import breakdown, damaged, input_fault, is_finite
from skink.training.loop.options import TrainOptions


def test_the_first_weight_that_is_not_finite_is_named() -> None:
    good, bad = torch.zeros(3, 2), torch.tensor([[0.0, torch.inf]])
    assert damaged([("one", good), ("two", torch.ones(2, dtype=torch.int64))]) == ""
    assert damaged([("one", good), ("two", bad), ("three", bad)]) == (
        "the weight 'two' was not finite before the first step."
    )
    assert damaged([("two", bad * torch.nan)], "the teacher's").startswith("the teacher's weight 'two'")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_number_is_enough(value: float, dtype: torch.dtype) -> None:
    tensor = torch.full((3, 50), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(tensor)
    assert is_finite(-tensor.T)
    tensor[1, 20] = value
    assert not is_finite(tensor)


def test_whole_numbers_and_nothing_are_finite() -> None:
    assert is_finite(torch.zeros(0, 3))
    assert is_finite(torch.tensor([True, False]))
    assert is_finite(torch.tensor(7))


def test_inputs_and_teachers_are_looked_at() -> None:
    class Taught:
        def own_weights(self) -> Any:
            raise NotImplementedError

        def teacher_fault(self, inputs: Any) -> str:
            return "the teacher is to blame."

    inputs = {"tokens": torch.zeros(2, 3, dtype=torch.int64), "mask": torch.tensor([0.0, -torch.inf])}
    assert input_fault(inputs, None) == ""
    assert input_fault(inputs, Taught()) == "the teacher is to blame."
    assert input_fault({**inputs, "x": torch.tensor([0.0, torch.nan])}, Taught()) == "the input 'x' holds NaN."


@pytest.mark.parametrize(
    ("given", "what", "why", "fix"),
    [
        (
            {"at": "at step 3 of 5", "tokens": 1234},
            "training broke down at step 3 of 5: its loss is nan.",
            "the learning rate was 0.02, after 1,234 tokens.",
            "try a lower learning_rate than 0.03, a longer warmup, precision=float32 instead of float16.",
        ),
        (
            {"of": "training of layers.1"},
            "training of layers.1 cannot begin: its loss is nan.",
            "no step was made yet, and all weights are finite: values within the model overflow, or have no slope.",
            "try precision=float32 instead of float16; see what the model gives for this text as it is.",
        ),
        (
            {"at": "at step 3 of 5", "cause": "the input 'x' holds NaN."},
            "training broke down at step 3 of 5: its loss is nan.",
            "the input 'x' holds NaN.",
            "begin with a model, a teacher and text whose numbers are finite.",
        ),
    ],
)
def test_the_learning_rate_is_blamed_where_nothing_else_is_known(
    given: dict[str, Any], what: str, why: str, fix: str
) -> None:
    options = TrainOptions(learning_rate=0.03, precision="float16")
    error = breakdown("its loss is nan", options, 0.02, **given)
    assert (error.code, error.what, error.why, error.fix) == ("RECOVER-003", what, why, fix)


def test_in_float32_no_other_precision_is_advised() -> None:
    for at in ("", "at step 2"):
        assert "precision" not in breakdown("its loss is nan", TrainOptions(), 0.1, at=at).fix
