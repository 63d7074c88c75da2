import pytest
import torch
from torch import nn

from skink.errors import RecoveryError
from skink.graph.windows import Windows
from skink.training.loop.options import TrainOptions
from skink.training.loop.order import Order
from skink.training.loop.schedule import learning_rate
from skink.training.loop.steps import adamw, check_text, rate_of, windows_read


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"steps": 7}, 14), ({}, 5), ({"tokens": 13}, 4), ({"tokens": 21}, 6)],
)
def test_windows_that_steps_read(given: dict[str, int], expected: int) -> None:
    text = Windows(torch.zeros(5, 4, dtype=torch.int64))
    assert windows_read(text, Order(5, 0), TrainOptions(batch=2, **given)) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (Windows(torch.zeros(0, 4, dtype=torch.int64)), "the held-out text has no window"),
        (Windows(torch.zeros(2, 0, dtype=torch.int64)), "the held-out text has no window"),
        (Windows(torch.ones(2, 4), padding=torch.zeros(2, 4)), "the held-out text is padding alone"),
    ],
)
def test_text_without_a_token_is_refused(text: Windows, said: str) -> None:
    with pytest.raises(RecoveryError, match=said) as caught:
        check_text(text, "held-out")
    assert caught.value.code == "RECOVER-008"
    check_text(Windows(torch.ones(2, 4), padding=torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]])))


def test_padding_is_not_read() -> None:
    text = Windows(torch.zeros(2, 4, dtype=torch.int64), padding=torch.tensor([[1, 1, 0, 0]] * 2))
    assert windows_read(text, Order(2, 0), TrainOptions(tokens=5)) == 3


def test_the_rate_is_the_schedule_s() -> None:
    options = TrainOptions(learning_rate=0.5, schedule="linear", warmup=0.2, final=0.25)
    shape = {"peak": 0.5, "schedule": "linear", "warmup": 0.2, "final": 0.25}
    assert [rate_of(step, 10, options) for step in range(10)] == [
        learning_rate(step, 10, **shape) for step in range(10)
    ]


def test_matrices_decay_and_others_do_not() -> None:
    matrix, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = adamw([matrix, bias], TrainOptions(weight_decay=0.1))
    for entry in optimizer.param_groups:
        entry["lr"] = 0.5
    matrix.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert matrix.tolist() == [[pytest.approx(0.95)] * 2] * 2
    assert bias.tolist() == [1.0, 1.0]


def test_options_reach_the_optimizer() -> None:
    optimizer = adamw([nn.Parameter(torch.ones(2))], TrainOptions(beta1=0.8, beta2=0.9, epsilon=1e-6))
    (group,) = optimizer.param_groups
    assert (group["betas"], group["eps"], group["fused"]) == ((0.8, 0.9), 1e-6, True)
