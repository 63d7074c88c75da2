"""Raising of rotary: what matches, near misses with their reasons, and the same numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from skink.graph.pattern import op_name
from tests.modules import Three
from tests.passes.canonicalize.checking import HEADS, check


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


@pytest.mark.parametrize(("dtype", "printed"), [(torch.int32, ": i32["), (torch.half, ": f16[")])
def test_tables_keep_casts_that_take_digits(dtype: torch.dtype, printed: str) -> None:
    body = lambda self, x, c, s: rotate(x, (c * 3).to(dtype).float(), (s * 3).to(dtype).float())  # noqa: E731
    ops, _, program = check(Three(body), HEADS, *tables(8), dims=ROTARY_DIMS)
    assert len(ops) == 1
    assert str(program).count(printed) == 2


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


def every_two(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def interleave(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.unsqueeze(1) + every_two(x) * sin.unsqueeze(1)


def by_tokens(turn: Any) -> Any:
    """The same on [B, T, H, D], as a model does that turns before it transposes."""

    def body(self: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return turn(x.transpose(1, 2), cos[:, :, None], sin[:, :, None]).permute(0, 2, 1, 3)

    return body


def chunked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def paired(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(3)


def paired_by_reshape(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).reshape(x.shape)


def gptj(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    sin, cos = (torch.repeat_interleave(table[:, :, :, ::2], 2, 3) for table in (sin, cos))
    return x * cos + every_two(x) * sin


def partial_by(turn: Any, width: int) -> Any:
    return lambda x, cos, sin: torch.cat((turn(x[..., :width], cos, sin), x[..., width:]), -1)


def split_by(turn: Any, width: int) -> Any:
    def body(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, rest = x.split([width, x.shape[-1] - width], dim=-1)
        return torch.cat((turn(first, cos, sin), rest), -1)

    return body


def no_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos[0] + half_split(x, 4) * sin[0]


def one_head(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos[:1] + every_two(x) * sin[:1]


@pytest.mark.parametrize(
    ("body", "width", "interleaved"),
    [
        (lambda self, *parts: interleave(*parts), 8, True),
        (lambda self, *parts: partial_by(interleave, 6)(*parts), 6, True),
        (lambda self, *parts: split_by(interleave, 6)(*parts), 6, True),
        (lambda self, *parts: split_by(rotate, 6)(*parts), 6, False),
        (lambda self, *parts: chunked(*parts), 4, False),
        (lambda self, *parts: paired(*parts), 4, True),
        (lambda self, *parts: paired_by_reshape(*parts), 4, True),
        (lambda self, *parts: partial_by(paired, 4)(*parts), 2, True),
        (lambda self, *parts: no_heads(*parts), 8, False),
        (lambda self, *parts: one_head(*parts), 8, True),
        (by_tokens(lambda x, cos, sin: x * cos + half_split(x) * sin), 8, False),
        (by_tokens(lambda x, cos, sin: x * cos + every_two(x) * sin), 8, True),
        (by_tokens(gptj), 8, True),
        (by_tokens(partial_by(gptj, 6)), 6, True),
    ],
)
def test_other_forms_of_rotary(body: Any, width: int, interleaved: bool) -> None:
    ops, reasons, program = check(Three(body), HEADS, *tables(width), dims=ROTARY_DIMS)
    assert (len(ops), reasons) == (1, [])
    assert ops[0].startswith("skink.rotary(%x, ")
    assert ops[0].endswith(", True)") is interleaved
    assert "transpose" not in str(program)
    assert "permute" not in str(program)


@pytest.mark.parametrize(
    ("body", "shape", "reason"),
    [
        (
            lambda self, x, c, s: x * c[:, None, :1] + every_two(x) * s.unsqueeze(1),
            (2, 4, 3, 8),
            "the cos table has not the shape [B, T, 8]",
        ),
        (
            lambda self, x, c, s: x * c[:, None] + every_two(x) * s[:, :, None],
            (2, 3, 3, 8),
            "cos and sin turn different axes",
        ),
        (lambda self, x, c, s: x * c + every_two(x) * s, (2, 3, 8), "3 dims, not four"),
        (
            lambda self, x, c, s: x * c[:, None] + every_two(x) * s[:, None],
            (2, 1, 3, 8),
            "",
        ),
    ],
)
def test_near_misses_of_other_forms(body: Any, shape: tuple[int, ...], reason: str) -> None:
    ops, reasons, _ = check(Three(body), torch.randn(shape), *tables(8), dims={})
    assert (len(ops), reasons) == ((0, [reason]) if reason else (1, []))


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x, c, s: (
            x * c.unsqueeze(1) + torch.stack((x[..., 1::2], x[..., ::2]), -1).flatten(-2) * s[:, None]
        ),
        lambda self, x, c, s: x * c.unsqueeze(1) + every_two(x + 1) * s.unsqueeze(1),
        lambda self, x, c, s: x * c.unsqueeze(1) - every_two(x) * s.unsqueeze(1),
    ],
    ids=["no-minus", "other", "backwards"],
)
def test_what_is_no_interleaved_rotary_is_left_alone(body: Any) -> None:
    assert check(Three(body), HEADS, *tables(8), dims=ROTARY_DIMS)[0] == []


def complex_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turn = torch.complex(cos, sin).unsqueeze(1)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(3).type_as(x)


def polar_pairs(x: Tensor, angle: Tensor, sin: Tensor) -> Tensor:
    turn = torch.polar(torch.ones_like(angle), angle)[:, :, None]
    pairs = torch.view_as_complex(x.transpose(1, 2).reshape(x.shape[0], x.shape[2], 4, -1, 2))
    return torch.view_as_real(turn * pairs).reshape(x.shape[0], x.shape[2], 4, 8).transpose(1, 2) + 0 * sin[0, 0, 0]


@pytest.mark.parametrize(("body", "left"), [(complex_pairs, ["complex", "view_as_real"]), (polar_pairs, [])])
def test_rotary_by_complex_numbers(body: Any, left: list[str]) -> None:
    ops, reasons, program = check(Three(lambda self, *parts: body(*parts)), HEADS, *tables(4), dims=ROTARY_DIMS)
    assert (len(ops), reasons) == (1, [])
    assert ops[0].startswith("skink.rotary(%x, ")
    assert ops[0].endswith(", True)")
    names = [op_name(node) for node in program.graph.nodes]
    assert [name for name in names if "complex" in name or "real" in name or "polar" in name] == left


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda self, x, c, s: complex_pairs(x, c[:, :1], s[:, :1]), "the factors have not the shape [B, T, 4]"),
        (lambda self, x, c, s: complex_pairs(x, c, s).flatten(2), ""),
        (
            lambda self, x, c, s: torch.view_as_real(
                torch.view_as_complex(x.reshape(2, 4, 3, 4, 2)) * torch.complex(c, s).unsqueeze(1)
            ).flatten(2),
            "the result has another shape than the input",
        ),
    ],
)
def test_near_misses_of_complex_numbers(body: Any, reason: str) -> None:
    ops, reasons, _ = check(Three(body), HEADS, *tables(4), dims={})
    assert (len(ops), reasons) == ((0, [reason]) if reason else (1, []))
