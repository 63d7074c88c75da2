"""Raising of linear layers: what matches, near misses with their reasons, and the same numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.modules import One, Two, parameter
from tests.passes.canonicalize.checking import X, check


def conv1d(self: Any, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """What transformers' Conv1D does, and near it."""
    return torch.addmm(self.b, x.view(-1, x.size(-1)), self.w, **options).view(*x.size()[:-1], self.w.size(1))


def test_transposed_linear() -> None:
    module = Two(conv1d, w=parameter(8, 5), b=parameter(5))
    ops, reasons, program = check(module, X, X.clone())
    assert (ops, reasons) == (["aten.linear(%x, @w, @b)"], [])
    assert program.weight("w").shape == (5, 8)
    assert module.w.shape == (8, 5)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda self, x, y: conv1d(self, x, y) + self.w.sum(), "the factor is not a weight of this call alone"),
        (
            lambda self, x, y: conv1d(One(None, w=self.w * 2, b=self.b), x, y),
            "the factor is not a weight of this call alone",
        ),
        (
            lambda self, x, y: torch.addmm(self.b, x.view(-1, 8), self.w).view(x.shape[0], -1),
            "the result does not have the input's leading dims",
        ),
        (
            lambda self, x, y: torch.addmm(self.b[:1], x.view(-1, 8), self.w).view(*x.shape[:2], 5),
            "the bias is not one number for each output",
        ),
    ],
)
def test_near_misses_of_transposed_linear(body: Any, reason: str) -> None:
    ops, reasons, _ = check(Two(body, w=parameter(8, 5), b=parameter(5)), X, X.clone())
    assert (ops, reasons) == ([], [reason])


@pytest.mark.parametrize("options", [{"beta": 0.5}, {"alpha": 2}])
def test_scaled_products_are_no_linear_layers(options: dict[str, float]) -> None:
    module = Two(lambda self, x, y: conv1d(self, x, y, **options), w=parameter(8, 5), b=parameter(5))
    assert check(module, X, X.clone())[0] == []


def test_a_product_of_half_the_width_is_no_linear_layer() -> None:
    body = lambda self, x: torch.addmm(self.b, x.view(-1, 4), self.w).view(*x.shape[:2], 10)  # noqa: E731
    ops, reasons, _ = check(One(body, w=parameter(4, 5), b=parameter(5)), X)
    assert (ops, reasons) == ([], ["the result does not have the input's leading dims"])
