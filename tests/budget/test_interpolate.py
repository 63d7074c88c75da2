"""Values between a few that are known."""

import torch

from skink.budget.interpolate import interpolate


def test_between_and_beyond_what_is_known() -> None:
    at = torch.tensor([0, 2, 3, 4, 6, 8, 10])
    assert interpolate(at, [2, 4, 8], [3.0, 7.0, 3.0]).tolist() == [0.0, 3.0, 5.0, 7.0, 5.0, 3.0, 1.0]
    assert interpolate(at, [2, 4], [4.0, 3.0])[-1] == 0.0
    assert interpolate(torch.tensor([1.5]), [1, 2], [1.0, 2.0]).dtype == torch.float64


def test_of_one_value_alone() -> None:
    found = interpolate(torch.tensor([1, 5, 9]), [3], [2.0])
    assert found.tolist() == [2.0, 2.0, 2.0]
