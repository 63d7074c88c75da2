"""What each family of operators does to tokens: what keeps them apart, checked by execution, and what mixes them."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from skink.graph.capture import capture
from skink.graph.mixing import token_mixing
from tests.graph.tokens import check_by_execution, places
from tests.modules import One, parameter

BATCH, LENGTH, WIDTH = 2, 5, 8
aten = torch.ops.aten

Body = Callable[[Any, Tensor], Any]


def _written(x: Tensor) -> Tensor:
    """In two parts, as some write halves of heads."""
    result = x.new_empty(x.shape)
    result[..., :4].copy_(x[..., 4:])
    result[..., 4:] = 1.0
    result[..., 5] = x[..., 0]
    result[0] = x[1]
    return result


APART: dict[str, Body] = {
    "pointwise": lambda m, x: torch.where(x > 0, x * m.scale, -x).clamp(max=2.0) + functional.gelu(x) ** 2,
    "masked": lambda m, x: x.masked_fill(x.sum(-1, keepdim=True) > 0, 0.0),
    "broadcast": lambda m, x: x + x.mean(-1, keepdim=True) * m.scale[None, None],
    "linear": lambda m, x: functional.linear(x, m.square, m.scale),
    "matmul": lambda m, x: (x @ m.square).relu() @ m.scale,
    "matmul from the left": lambda m, x: (m.square @ x.transpose(1, 2)).transpose(1, 2),
    "matmul by token": lambda m, x: x.unsqueeze(-2) @ x.unsqueeze(-1),
    "addmm": lambda m, x: torch.addmm(m.scale, x.reshape(-1, WIDTH), m.square).view(x.shape),
    "bmm": lambda m, x: torch.bmm(x.reshape(-1, 1, WIDTH), m.square.expand(x.shape[0] * x.shape[1], -1, -1)),
    "einsum": lambda m, x: torch.einsum("btd,de->bte", x, m.square),
    "reduce": lambda m, x: x.sum(-1) + x.amax(2) + x.argmax(-1) + torch.linalg.vector_norm(x, dim=-1),
    "reduce to pairs": lambda m, x: x.max(-1).values + x.min(-1).indices,
    "batch": lambda m, x: x.mean(0) + x.sum((0, 2))[:, None],
    "softmax": lambda m, x: x.softmax(-1) + x.log_softmax(2),
    "cumsum": lambda m, x: x.cumsum(-1).flip(-1).roll(1, 2),
    "sort": lambda m, x: x.sort(-1).values + x.topk(WIDTH).values,
    "layer norm": lambda m, x: functional.layer_norm(x, (WIDTH,), m.scale),
    "rms norm": lambda m, x: functional.rms_norm(x, (WIDTH,), m.scale) + torch.ops.skink.rms_norm(x, m.scale, 1e-6),
    "flatten": lambda m, x: (x.reshape(-1, WIDTH) * 2).view(x.shape),
    "flatten with width": lambda m, x: (x.flatten(1).relu() * 2).unflatten(1, (-1, WIDTH)),
    "heads": lambda m, x: x.view(x.shape[0], -1, 2, 4).transpose(1, 2).contiguous().transpose(1, 2).flatten(2),
    "permute": lambda m, x: x.permute(2, 1, 0).movedim(0, -1).swapaxes(0, 1).mT.mT,
    "expand": lambda m, x: m.scale.expand(x.shape[0], x.shape[1], -1) + x,
    "expand heads": lambda m, x: x[:, None].expand(-1, 3, -1, -1).reshape(x.shape[0] * 3, -1, WIDTH),
    "repeat": lambda m, x: x.repeat(2, 1, 3) + m.scale.repeat(3),
    "repeat batch of flat": lambda m, x: x.reshape(-1, WIDTH).repeat(2, 1).tanh(),
    "repeat each": lambda m, x: x.reshape(-1, WIDTH).repeat_interleave(2, 0).view(*x.shape[:2], 2, WIDTH).sum(2),
    "cat": lambda m, x: torch.cat([x, x * 2, torch.zeros_like(x)], -1),
    "stack": lambda m, x: torch.stack([x, x + 1], 1).sum(1) + torch.stack([x, x], -1)[..., 0],
    "split": lambda m, x: x.chunk(2, -1)[0] * x.split([2, 4, 2], -1)[1] + x.unbind(-1)[0][..., None],
    "slice": lambda m, x: x[..., 2:6:2] + x[:, :, :2] + x.narrow(2, 1, 2) + x[:, :, 3, None],
    "slice of all": lambda m, x: x[:, : x.shape[1]],
    "pad": lambda m, x: functional.pad(x, (1, 2)),
    "squeeze": lambda m, x: x[None, :, :, None].squeeze(0).squeeze(2),
    "constants": lambda m, x: x + torch.zeros(x.shape[1], 1) + x.new_ones(x.shape) * torch.full_like(x, 2.0),
    "positions among features": lambda m, x: x * torch.arange(WIDTH),
    "embedding": lambda m, x: functional.embedding((x[..., 0] > 0).long(), m.square),
    "index": lambda m, x: m.square[(x[..., 0] > 0).long()] + m.square[:, (x[..., 1] > 0).long()].permute(1, 2, 0),
    "index features": lambda m, x: x[..., [3, 1, 2]] + x[:, :, torch.tensor([[0, 1, 2]])][:, :, 0],
    "index select": lambda m, x: x.index_select(2, torch.tensor([3, 1])),
    "gather": lambda m, x: x.gather(-1, x.argsort(-1)),
    "scatter": lambda m, x: torch.zeros_like(x).scatter(-1, x.topk(2).indices, 1.0),
    "scatter add": lambda m, x: x.scatter_add(-1, x.topk(2).indices, x.topk(2).values),
    "lesser of two": lambda m, x: torch.min(x, m.scale) + x.max(x * 2),
    "written in parts": lambda m, x: _written(x),
    "complex": lambda m, x: torch.view_as_real(
        torch.polar(x, x) * torch.view_as_complex(x.unflatten(-1, (4, 2)))[..., :1]
    ),
    "glu": lambda m, x: functional.glu(x, -1),
    "dtype": lambda m, x: x.double().to(torch.int64).type_as(x).half(),
    "dropout": lambda m, x: functional.dropout(x, 0.5, training=False),
    "routing": lambda m, x: _routed(m, x),
    "ratio of sizes": lambda m, x: x * (x.shape[0] + 1),
}


def _routed(module: Any, x: Tensor) -> Tensor:
    """Two of eight experts for each token, over flattened tokens."""
    flat = x.reshape(-1, WIDTH)
    shares, chosen = (flat @ module.square).softmax(-1).topk(2, -1)
    shares = shares / shares.sum(-1, keepdim=True)
    weights = module.experts[chosen.flatten()]
    rows = flat.repeat_interleave(2, 0).unsqueeze(-1)
    mixed = (weights @ rows).squeeze(-1) * shares.flatten()[:, None]
    return mixed.view(-1, 2, WIDTH).sum(1).view(x.shape)


MIXED: dict[str, tuple[Body, str]] = {
    "mean": (lambda m, x: x - x.mean(1, keepdim=True), "works along axis 1"),
    "mean of all": (lambda m, x: x - x.mean(), "works along axis 1"),
    "sum over flat": (lambda m, x: x.reshape(-1, WIDTH).sum(0), "works along axis 0"),
    "max": (lambda m, x: x.max(1).values, "works along axis 1"),
    "cumsum": (lambda m, x: x.cumsum(1), "works along axis 1"),
    "softmax": (lambda m, x: x.softmax(1), "works along axis 1"),
    "sort": (lambda m, x: x.sort(1).values, "works along axis 1"),
    "flip": (lambda m, x: x.flip(1), "works along axis 1"),
    "roll": (lambda m, x: x.roll(1, 1), "works along axis 1"),
    "roll of all": (lambda m, x: x.roll(1), "works along axis 1"),
    "norm of groups": (lambda m, x: functional.group_norm(x.transpose(1, 2), 2), "no rule"),
    "convolution": (lambda m, x: functional.conv1d(x.transpose(1, 2), m.kernel, padding=1), "no rule"),
    "last token": (lambda m, x: x[:, -1], "works along axis 1"),
    "all but one": (lambda m, x: x[:, :-1], "takes some of the tokens"),
    "every other": (lambda m, x: x[:, ::2], "takes some of the tokens"),
    "token shift": (lambda m, x: functional.pad(x, (0, 0, 1, -1)), "before or after the tokens"),
    "prefix": (lambda m, x: torch.cat([m.scale.expand(x.shape[0], 1, -1), x], 1), "behind others"),
    "twice": (lambda m, x: torch.cat([x, x], 1), "behind others"),
    "scores": (lambda m, x: x @ x.transpose(1, 2), "every token against every other"),
    "scores by einsum": (lambda m, x: torch.einsum("btd,bsd->bts", x, x), "every token against every other"),
    "differences": (lambda m, x: x[:, :, None] - x[:, None], "every token against every other"),
    "attention": (
        lambda m, x: functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
        "no rule",
    ),
    "gram": (lambda m, x: x.transpose(1, 2) @ x, "sums over the tokens"),
    "positions": (lambda m, x: x + torch.arange(x.shape[1])[:, None], "positions are counted"),
    "table of positions": (lambda m, x: x + m.table[torch.arange(x.shape[1])], "positions are counted"),
    "triangle": (lambda m, x: torch.ones(x.shape[1], x.shape[1]).tril(), "positions are counted"),
    "length": (lambda m, x: x / x.shape[1], "depends on the number of tokens"),
    "length as a number": (lambda m, x: x.masked_fill(x > 0, x.shape[1]), "depends on the number of tokens"),
    "reversed by index": (lambda m, x: x[:, torch.arange(x.shape[1]) - 1], "positions are counted"),
    "picked": (lambda m, x: x[:, [0, 1]], "picks tokens"),
    "gather": (lambda m, x: x.gather(1, x.argsort(-1)), "picks tokens"),
    "argsort of tokens": (lambda m, x: x.gather(1, x.argsort(1)), "works along axis 1"),
    "unfold": (lambda m, x: x.unfold(1, 1, 1), "no rule"),
    "transposed as a view": (lambda m, x: x.reshape(x.shape[0], WIDTH, -1), "takes tokens apart"),
    "batched tokens": (lambda m, x: x.transpose(0, 1).reshape(x.shape) + x, "every token against|takes tokens apart"),
    "bits": (lambda m, x: x.double().view(torch.float32), "takes elements apart|takes tokens apart"),
    "a number": (lambda m, x: x * x.shape[1] ** 0.5, "depends on the number of tokens"),
}


def _module(body: Body) -> nn.Module:
    torch.manual_seed(0)
    return One(
        body,
        scale=parameter(WIDTH),
        square=parameter(WIDTH, WIDTH),
        experts=parameter(WIDTH, WIDTH, WIDTH),
        kernel=parameter(WIDTH, WIDTH, 3),
        table=parameter(64, WIDTH),
    )


@pytest.mark.parametrize("name", APART)
def test_tokens_stay_apart(name: str) -> None:
    program = capture(_module(APART[name]), (torch.randn(BATCH, LENGTH, WIDTH),))
    x = torch.randn(BATCH, LENGTH, WIDTH)
    mixing = check_by_execution(program, [x], length=LENGTH)
    assert mixing.mixes == {}
    (result,) = program.graph.output_node().args[0]
    axis = mixing.token_axis(result)
    assert axis is not None
    # Nor does it know how many tokens there are.
    whole, part = program(x)[0], program(x[:, :3])[0]
    first = torch.nonzero(places(axis, whole, LENGTH) < 3)[:, 0]
    torch.testing.assert_close(part, whole.index_select(axis.index, first), rtol=1e-5, atol=1e-5)


# Bodies that keep the shape [B, T, 8]; the last four mix tokens.
STEPS: list[Body] = [
    lambda m, x: x * m.scale + x.mean(-1, keepdim=True),
    lambda m, x: (x.reshape(-1, WIDTH) @ m.square).view(x.shape),
    lambda m, x: x.view(x.shape[0], -1, 2, 4).transpose(1, 2).softmax(-1).transpose(1, 2).reshape(x.shape),
    lambda m, x: _routed(m, x),
    lambda m, x: torch.cat([x.chunk(2, -1)[1], x[..., :4]], -1).transpose(1, 2).contiguous().mT,
    lambda m, x: x.flatten(1).repeat_interleave(2, 1).unflatten(1, (-1, WIDTH, 2)).sum(-1),
    lambda m, x: x.gather(-1, x.argsort(-1)) + m.square[(x[..., 0] > 0).long()],
    lambda m, x: x.cumsum(1),
    lambda m, x: x.flip(1),
    lambda m, x: x - x.mean(1, keepdim=True),
    lambda m, x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
]


@settings(max_examples=15)
@given(st.lists(st.integers(0, len(STEPS) - 1), min_size=1, max_size=4), st.integers(0, LENGTH - 2))
def test_what_is_proven_holds_in_random_graphs(steps: list[int], token: int) -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        x = x * 2
        for step in steps:
            x = STEPS[step](self, x)
        return x

    program = capture(_module(body), (torch.randn(BATCH, LENGTH, WIDTH),))
    mixing = check_by_execution(program, [torch.randn(BATCH, LENGTH, WIDTH)], length=LENGTH, token=token)
    assert bool(mixing.mixes) == any(step >= len(STEPS) - 4 for step in steps)


@pytest.mark.parametrize("name", MIXED)
def test_tokens_are_mixed(name: str) -> None:
    body, reason = MIXED[name]
    program = capture(_module(body), (torch.randn(BATCH, LENGTH, WIDTH),))
    mixing = token_mixing(program)
    assert mixing.origins
    assert re.search(reason, mixing.mixes[mixing.origins[0]])
    (result,) = program.graph.output_node().args[0]
    assert result in mixing.mixes
