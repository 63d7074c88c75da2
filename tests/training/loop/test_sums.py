import pytest
import torch

from skink.training.loop.processes import processes
from skink.training.loop.sums import Sums


def test_means_are_over_all_tokens_that_count() -> None:
    sums = Sums()
    for loss, tokens, counts in ((6.0, 2, True), (3.0, 1, True), (100.0, 50, False)):
        sums.add({"loss": torch.tensor(loss), "tokens": torch.tensor(tokens), "ce": torch.tensor(0.5)}, counts=counts)
    with processes(torch.device("cpu"), "none") as group:
        assert sums.means(group) == ({"ce": 1 / 3, "loss": 3.0}, 3.0)


def test_nothing_counted_is_divided_by_one() -> None:
    sums = Sums()
    sums.add({"loss": torch.tensor(0.0), "tokens": torch.tensor(0)})
    with processes(torch.device("cpu"), "none") as group:
        assert sums.means(group) == ({"loss": 0.0}, 1.0)
        with pytest.raises(RuntimeError, match="no batch"):
            Sums().means(group)
