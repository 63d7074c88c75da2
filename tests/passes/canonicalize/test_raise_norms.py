"""Raising of norms: what matches, near misses with their reasons, and the same numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.modules import One, parameter
from tests.passes.canonicalize.checking import X, check


def normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize(
    ("body", "printed"),
    [
        (lambda self, x: self.w * normalise(x), "skink.rms_norm(%x, @w, 1e-06, 0.0)"),
        (lambda self, x: normalise(x, 0.1) * self.w, "skink.rms_norm(%x, @w, 0.1, 0.0)"),
        (lambda self, x: normalise(x), "skink.rms_norm(%x, None, 1e-06, 0.0)"),
        (lambda self, x: torch.rsqrt(1e-6 + (x**2).mean(-1, True)) * x * self.w, "skink.rms_norm(%x, @w, 1e-06, 0.0)"),
        (lambda self, x: normalise(x) * (1.0 + self.w), "skink.rms_norm(%x, @w, 1e-06, 1.0)"),
        (lambda self, x: normalise(x) * (self.w + 2), "skink.rms_norm(%x, @w, 1e-06, 2.0)"),
        (lambda self, x: nn.functional.rms_norm(x, [8], self.w, 1e-5), "skink.rms_norm(%x, @w, 1e-05, 0.0)"),
        (lambda self, x: x / (x.pow(2).mean(-1, True) + 1e-6).sqrt() * self.w, "skink.rms_norm(%x, @w, 1e-06, 0.0)"),
        (lambda self, x: x / torch.sqrt((x * x).mean(2, True) + 1e-6), "skink.rms_norm(%x, None, 1e-06, 0.0)"),
        (lambda self, x: x * (x.square().mean(-1, True) + 1e-6) ** -0.5, "skink.rms_norm(%x, None, 1e-06, 0.0)"),
        (lambda self, x: x / (x.square().mean(-1, True) + 1e-6) ** 0.5, "skink.rms_norm(%x, None, 1e-06, 0.0)"),
        (lambda self, x: x * (1 / torch.sqrt((x * x).mean(-1, True) + 1e-6)), "skink.rms_norm(%x, None, 1e-06, 0.0)"),
        (lambda self, x: nn.functional.rms_norm(x, [8], None, 1e-5), "skink.rms_norm(%x, None, 1e-05, 0.0)"),
    ],
)
def test_norms(body: Any, printed: str) -> None:
    assert check(One(body, w=parameter(8)), X)[:2] == ([printed], [])


@pytest.mark.parametrize(
    ("body", "dtype"),
    [
        (lambda self, x: self.w * normalise(x.float()).to(x.dtype), torch.bfloat16),
        (lambda self, x: (self.w.float() * normalise(x.float())).to(x.dtype), torch.bfloat16),
        (lambda self, x: (normalise(x.float()) * (1.0 + self.w.float())).type_as(x), torch.float16),
        (
            lambda self, x: self.w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + 1e-6)).to(x.dtype),
            torch.float16,
        ),
    ],
)
def test_norms_with_casts_around_them(body: Any, dtype: torch.dtype) -> None:
    ops, reasons, program = check(One(body, w=parameter(8, dtype=dtype)), X.to(dtype))
    assert len(ops) == 1
    assert ops[0].startswith("skink.rms_norm(%x, @w, 1e-06")
    assert reasons == []
    assert "aten.to" not in str(program)


def test_a_norm_that_stays_wide_stays_wide() -> None:
    ops, _, program = check(
        One(lambda self, x: normalise(x.float()) * self.w.float(), w=parameter(8, dtype=torch.float16)), X.half()
    )
    assert len(ops) == 1
    assert "f32[B,T,8] = skink.rms_norm(" in str(program)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda self, x: normalise(x, self.e), "eps is not a number"),
        (lambda self, x: normalise(x) * self.one, "the weight has shape (1,), not (8,)"),
        (lambda self, x: normalise(x) * self.w[None], "the factor is not a weight"),
        (lambda self, x: normalise(x) * (self.w + self.w), "the factor is not a weight"),
        (lambda self, x: normalise(x) * torch.sigmoid(x), "the factor is not a weight"),
        (lambda self, x: normalise(x) * self.w.to(torch.int32), "the factor is not a weight"),
        (lambda self, x: normalise(x) * self.w.to(torch.int32).float(), "the factor is not a weight"),
        (lambda self, x: normalise(x) * self.w.half().float(), "the factor is not a weight"),
        (lambda self, x: normalise(x) * (1 + self.w.bool()), "the factor is not a weight"),
        (lambda self, x: nn.functional.rms_norm(x, [3, 8], self.w2, 1e-5), "over 2 dims, not one"),
        (lambda self, x: nn.functional.rms_norm(x, [8], self.w), "eps is left to the dtype"),
        (lambda self, x: nn.functional.rms_norm(x, [8], x[0, 0], 1e-5), "the factor is not a weight"),
    ],
)
def test_near_misses_of_norms(body: Any, reason: str) -> None:
    module = One(body, w=parameter(8), one=parameter(1), w2=parameter(3, 8), e=nn.Parameter(torch.tensor(0.1)))
    _, reasons, _ = check(module, X, dims={"x": {0: "B"}})
    assert reason in reasons


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
        lambda self, x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + 1e-6),
        lambda self, x: x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 0.5, alpha=2)),
        lambda self, x: (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda self, x: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda self, x: x * torch.rsqrt(x.half().pow(2).mean(-1, keepdim=True) + 1e-6),
    ],
    ids=["axis", "power", "alpha", "other", "sqrt", "half"],
)
def test_what_is_no_norm_is_left_alone(body: Any) -> None:
    assert check(One(body), X)[0] == []


@pytest.mark.parametrize("narrow", [torch.float16, torch.int8])
def test_a_weight_after_a_narrower_cast_is_left_outside(narrow: torch.dtype) -> None:
    ops, _, _ = check(One(lambda self, x: self.w * normalise(x).to(narrow), w=parameter(8)), X)
    assert ops == ["skink.rms_norm(%x, None, 1e-06, 0.0)"]


def standardise(x: Tensor, eps: float = 1e-5) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + eps)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("body", "printed"),
    [
        (lambda self, x: standardise(x) * self.w + self.b, "aten.layer_norm(%x, [8], @w, @b, 1e-05)"),
        (lambda self, x: self.b + self.w * standardise(x), "aten.layer_norm(%x, [8], @w, @b, 1e-05)"),
        (lambda self, x: standardise(x, 0.1) * self.w, "aten.layer_norm(%x, [8], @w, None, 0.1)"),
        (lambda self, x: standardise(x), "aten.layer_norm(%x, [8], None, None, 1e-05)"),
        (
            lambda self, x: centred(x) * torch.rsqrt(centred(x).pow(2).mean(-1, keepdim=True) + 1e-5) * self.w,
            "aten.layer_norm(%x, [8], @w, None, 1e-05)",
        ),
        (
            lambda self, x: centred(x) / ((centred(x) * centred(x)).mean(2, True) + 1e-5) ** 0.5 * self.w + self.b,
            "aten.layer_norm(%x, [8], @w, @b, 1e-05)",
        ),
        (
            lambda self, x: centred(x) * torch.rsqrt(torch.var(x, -1, correction=0, keepdim=True) + 1e-5),
            "aten.layer_norm(%x, [8], None, None, 1e-05)",
        ),
    ],
)
def test_layer_norms(body: Any, printed: str) -> None:
    assert check(One(body, w=parameter(8), b=parameter(8)), X)[:2] == ([printed], [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norms_with_casts_around_them(dtype: torch.dtype) -> None:
    module = One(lambda self, x: (standardise(x.float()) * self.w.float()).to(x.dtype), w=parameter(8, dtype=dtype))
    ops, reasons, program = check(module, X.to(dtype))
    assert (ops, reasons) == (["aten.layer_norm(%x, [8], @w, None, 1e-05)"], [])
    assert "aten.to" not in str(program)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            lambda self, x: centred(x) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5),
            "the variance is that of a sample, over one less than the width",
        ),
        (lambda self, x: standardise(x, self.e), "eps is not a number"),
        (lambda self, x: standardise(x) * self.one, "the weight is not one number for each feature"),
    ],
)
def test_near_misses_of_layer_norms(body: Any, reason: str) -> None:
    module = One(body, one=parameter(1), e=nn.Parameter(torch.tensor(0.1)))
    assert check(module, X)[1] == [reason]


@pytest.mark.parametrize("dtype", [torch.int32, torch.half])
def test_factors_of_layer_norms_keep_their_casts(dtype: torch.dtype) -> None:
    body = lambda self, x: nn.functional.layer_norm(x, [8], None, self.b) * self.w.to(dtype).float()  # noqa: E731
    other = lambda self, x: nn.functional.layer_norm(x, [8]) * self.w.to(dtype).float()  # noqa: E731
    third = lambda self, x: nn.functional.layer_norm(x, [8], self.w) + self.b.to(dtype).float()  # noqa: E731
    for one in (body, other, third):
        ops, _, _ = check(One(one, w=nn.Parameter(torch.randn(8) * 4), b=nn.Parameter(torch.randn(8) * 4)), X)
        assert len(ops) == 1


def test_what_is_no_layer_norm_is_left_alone() -> None:
    body = lambda self, x: centred(x) / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)  # noqa: E731
    assert check(One(body), X)[:2] == ([], [])
