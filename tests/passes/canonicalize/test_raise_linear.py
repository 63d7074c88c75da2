"""Raising of linear layers: what matches, near misses with their reasons, and the same numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

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


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x: x.float() @ self.w.float().t(),
        lambda self, x: functional.linear(x.float(), self.w.float()) + self.b.float(),
        lambda self, x: x.float() @ self.w.float().t() + self.b.float(),
    ],
    ids=["product", "bias", "both"],
)
def test_wide_products_of_narrow_numbers_stay_wide(body: Any) -> None:
    parts = {"w": parameter(5, 8, dtype=torch.bfloat16), "b": parameter(5, dtype=torch.bfloat16)}
    ops, reasons, program = check(One(body, **parts), X.bfloat16())
    assert (len(ops), reasons) == (1, [])
    assert program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0].meta["val"].dtype is (
        torch.float32
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            lambda self, x: functional.linear(x, self.w).half().float() + self.b,
            "",
        ),
        (
            lambda self, x: functional.linear(x, self.w).half() + self.b.half(),
            "the bias is cast to fewer digits",
        ),
        (lambda self, x: functional.linear(x, self.w) + self.b.half().float(), "the bias is cast to fewer digits"),
        (
            lambda self, x: functional.linear(x, self.w) + self.b.to(torch.int32).float(),
            "the bias is cast to fewer digits",
        ),
        (lambda self, x: functional.linear(x, self.w) + self.b.to(torch.int32), ""),
        (lambda self, x: functional.linear(x, self.w) + self.b.bool(), ""),
    ],
)
def test_near_misses_of_a_bias(body: Any, reason: str) -> None:
    ops, reasons, _ = check(One(body, w=parameter(5, 8), b=torch.nn.Parameter(torch.randn(5) * 4)), X)
    assert ops == ["aten.linear(%x, @w)"]
    # What the pattern itself does not describe is no refusal.
    assert reasons == ([reason] if reason else [])
