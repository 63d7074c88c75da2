"""Attention as models write it by hand, and the pieces that tests put it together from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.passes.canonicalize import Canonicalize
from tests.modules import parameter
from tests.passes.canonicalize.checking import raised


class ByHand(nn.Module):
    """Attention as models write it, on [B, H, T, D] made of x [B, T, E]; `weigh(self, q, k, v, mask)` is the test's."""

    def __init__(self, weigh: Callable[..., Tensor], heads: int = 4, kv_heads: int = 4, **buffers: Tensor) -> None:
        super().__init__()
        self.weigh, self.heads, self.kv_heads = weigh, heads, kv_heads
        self.q, self.k, self.v = (nn.Linear(16, count * 4, bias=False) for count in (heads, kv_heads, kv_heads))
        self.sinks = parameter(heads)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:2], count, 4).transpose(1, 2)
            for layer, count in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        return self.weigh(self, q, k, v, attention_mask)


LENGTH = 7
TOKENS = torch.randn(3, LENGTH, 16)
PRESENT = torch.ones(3, LENGTH, dtype=torch.int64)
MASK_DIMS = {"x": {0: "B", 1: "T"}, "attention_mask": {0: "B", 1: "T"}}
LEAST = torch.finfo(torch.float32).min


def by_hand(weigh: Callable[..., Tensor], *, verify: int = 2, **options: Any) -> tuple[list[str], list[str], Program]:
    """Canonicalized, checked on left padding where nothing is read at padding: (raised, reasons, program)."""
    module = ByHand(weigh, **options).eval()
    program = capture(module, (TOKENS, PRESENT), dims=MASK_DIMS)
    (done,) = Pipeline((Canonicalize(),)).run(program, verify=verify).passes
    padded = PRESENT.clone()
    padded[0, :3] = 0
    padded[1, :1] = 0
    for mask in (PRESENT, padded):
        with torch.no_grad():
            wanted, found = module(TOKENS, mask), program(TOKENS, mask)[0]
        real = mask[:, None, :, None] != 0
        torch.testing.assert_close(found.where(real, 0.0), wanted.where(real, 0.0))
    text = [line for line in raised(program) if line.startswith("skink.")]
    return text, [entry.reason for entry in done.result.refused], program


def causal_mask(q: Tensor) -> Tensor:
    length = q.shape[2]
    return torch.ones(length, length, dtype=torch.bool).tril()


def without_largest(scores: Tensor) -> Tensor:
    return scores - scores.amax(-1, True)


def additive(q: Tensor, mask: Tensor) -> Tensor:
    allowed = causal_mask(q) & mask.bool()[:, None, None, :]
    return torch.where(allowed, 0.0, LEAST)


def plain(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


def product(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def repeated(x: Tensor, times: int) -> Tensor:
    return x[:, :, None].expand(-1, -1, times, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


def folded(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])


def sink_column(self: Any, q: Tensor) -> Tensor:
    return self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)


def beside_sinks(self: Any, q: Tensor, scores: Tensor, after: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    return after(torch.cat([scores, sink_column(self, q)], -1)).softmax(-1)[..., :-1] @ v


def slopes(count: int = 4) -> Tensor:
    return torch.pow(2.0, -torch.arange(1, count + 1, dtype=torch.float32))


def ahead(q: Tensor) -> Tensor:
    """Key position less query position."""
    position = torch.arange(q.shape[2])
    return position[None] - position[:, None]


def near(q: Tensor, window: int) -> Tensor:
    return causal_mask(q) & (ahead(q) > -window)
