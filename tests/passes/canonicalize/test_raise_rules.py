"""Each raising rule alone: what it matches, near misses with their reasons, and the same numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from skink.graph.passes import PassResult
from skink.graph.program import Program
from tests.modules import One, Three, Two, parameter, results
from tests.programs import canonicalized

X = torch.randn(2, 3, 8)


def raised(program: Program) -> list[str]:
    """The ops of ours and the linear layers in the program, as printed."""
    lines = [line.partition(" = ")[2].partition("  # ")[0] for line in str(program).splitlines()]
    return [line for line in lines if line.startswith(("skink.", "aten.linear"))]


def check(module: nn.Module, *examples: Tensor, dims: Any = None) -> tuple[list[str], list[str], Program]:
    """Canonicalized, verified against the module itself: (what was raised, reasons of refusals, program)."""
    program, result = canonicalized(module, *examples, dims=dims)
    assert isinstance(result, PassResult)
    for one, other in zip(program(*examples), results(module, *examples), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other)
    return raised(program), [entry.reason for entry in result.refused], program


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


HEADS = torch.randn(2, 4, 3, 8)


def half_split(x: Tensor, at: int = 4) -> Tensor:
    return torch.cat((-x[..., at:], x[..., :at]), -1)


def tables(width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, width), torch.randn(2, 3, width)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.unsqueeze(1) + half_split(x, x.shape[-1] // 2) * sin.unsqueeze(1)


def partly(self: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat((rotate(x[..., :6], cos, sin), x[..., 6:]), -1)


ROTARY_DIMS = {"x": {0: "B", 2: "T"}, "y": {0: "B", 1: "T"}, "z": {0: "B", 1: "T"}}


@pytest.mark.parametrize(("body", "width"), [(lambda self, *parts: rotate(*parts), 8), (partly, 6)])
def test_rotary(body: Any, width: int) -> None:
    ops, reasons, _ = check(Three(body), HEADS, *tables(width), dims=ROTARY_DIMS)
    assert (ops, reasons) == (["skink.rotary(%x, %y, %z)"], [])


def test_tables_of_one_row_serve_all_rows() -> None:
    row = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    dims = {"x": {0: "B", 2: "T"}, "y": {1: "T"}, "z": {1: "T"}}
    assert len(check(Three(lambda self, *parts: rotate(*parts)), HEADS, *row, dims=dims)[0]) == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda self, x, c, s: x * c.unsqueeze(1) + half_split(x, 3) * s.unsqueeze(1), "halves of 3 do not make 8"),
        (lambda self, x, c, s: rotate(x, c[..., :1], s), "the cos table has not the shape [B, T, 8]"),
        (lambda self, x, c, s: rotate(x, c, s[:, :1]), "the sin table has not the shape [B, T, 8]"),
    ],
)
def test_near_misses_of_rotary(body: Any, reason: str) -> None:
    ops, reasons, _ = check(Three(body), HEADS, *tables(8), dims=ROTARY_DIMS)
    assert (ops, reasons) == ([], [reason])


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x, c, s: torch.cat((rotate(x[..., :4], c, s), x[..., 5:]), -1),
        lambda self, x, c, s: torch.cat((rotate(x[..., :4], c, s), self.other[..., 4:].expand_as(x[..., 4:])), -1),
        lambda self, x, c, s: torch.cat((rotate(x[..., :4], c, s), -x[..., 4:]), -1),
    ],
    ids=["gap", "other", "changed"],
)
def test_near_misses_of_partial_rotary(body: Any) -> None:
    module = Three(body, other=torch.randn(1, 1, 1, 8))
    ops, _, _ = check(module, HEADS, *tables(4), dims=ROTARY_DIMS)
    assert len(ops) == 1
    assert ops[0].startswith("skink.rotary(%slice")


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x, c, s: x * c.unsqueeze(1) + half_split(x) * c.unsqueeze(1) * 2,
        lambda self, x, c, s: x * c.unsqueeze(1) - half_split(x) * s.unsqueeze(1),
        lambda self, x, c, s: torch.add(x * c.unsqueeze(1), half_split(x) * s.unsqueeze(1), alpha=2),
        lambda self, x, c, s: x * c.unsqueeze(1) + torch.cat((x[..., 4:], -x[..., :4]), -1) * s.unsqueeze(1),
        lambda self, x, c, s: x * c.unsqueeze(1) + half_split(x + 1) * s.unsqueeze(1),
    ],
    ids=["twice", "minus", "alpha", "backwards", "other"],
)
def test_what_is_no_rotary_is_left_alone(body: Any) -> None:
    assert check(Three(body), HEADS, *tables(8), dims=ROTARY_DIMS)[0] == []


ATTENTION_DIMS = {"x": {0: "B", 2: "T"}, "y": {0: "B", 2: "T"}, "z": {0: "B", 2: "T"}}


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        ({}, "skink.attention(%x, %y, %z, causal=False, scale=0.35355339059327373)"),
        ({"is_causal": True}, "skink.attention(%x, %y, %z, causal=True, scale=0.35355339059327373)"),
        ({"is_causal": True, "scale": 0.5}, "skink.attention(%x, %y, %z, causal=True, scale=0.5)"),
    ],
)
@pytest.mark.parametrize("heads", [4, 2])
def test_attention(options: dict[str, Any], printed: str, heads: int) -> None:
    module = Three(lambda self, *parts: scaled_dot_product_attention(*parts, enable_gqa=heads < 4, **options))
    others = [(2, heads, 3, 8)] * 2
    assert check(module, HEADS, *map(torch.randn, others), dims=ATTENTION_DIMS)[:2] == ([printed], [])


@pytest.mark.parametrize(
    ("body", "shapes", "reason"),
    [
        (
            lambda self, x, y, z: scaled_dot_product_attention(x, y, y + 1, attn_mask=z > 0),
            [(2, 4, 3, 8), (2, 4, 3, 8), (3, 3)],
            "the mask is a tensor of unknown kind",
        ),
        (
            lambda self, x, y, z: scaled_dot_product_attention(x, y, z),
            [(2, 3, 8), (2, 3, 8), (2, 3, 8)],
            "3 dims, not [B, H, T, D]",
        ),
        (
            lambda self, x, y, z: scaled_dot_product_attention(x, y, z, is_causal=True),
            [(2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)],
            "causal with more keys than queries, which PyTorch aligns at the first",
        ),
        (
            lambda self, x, y, z: scaled_dot_product_attention(x, y, z),
            [(2, 4, 3, 8), (1, 4, 3, 8), (1, 4, 3, 8)],
            "batches or heads are broadcast",
        ),
        (
            lambda self, x, y, z: scaled_dot_product_attention(x, y, z),
            [(2, 1, 3, 8), (2, 4, 3, 8), (2, 4, 3, 8)],
            "batches or heads are broadcast",
        ),
    ],
    ids=["mask", "dims", "aligned", "batch", "heads"],
)
def test_near_misses_of_attention(body: Any, shapes: list[tuple[int, ...]], reason: str) -> None:
    ops, reasons, _ = check(Three(body), *map(torch.randn, shapes), dims={})
    assert (ops, reasons) == ([], [reason])


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
