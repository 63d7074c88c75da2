"""Raising of attention: what matches, near misses with their reasons, and the same numbers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from skink.graph.capture import capture
from skink.graph.pattern import op_name
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.passes.canonicalize import Canonicalize
from tests.modules import Three, parameter
from tests.passes.canonicalize.checking import HEADS, check, raised

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
            "the mask depends on z, which is no padding mask [B, S]",
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


CAUSAL = "causal=True, scale=0.5)"
WAYS: dict[str, Callable[..., Tensor]] = {
    "scale-after": lambda self, q, k, v, m: plain(product(q, k) * 0.5 + additive(q, m), v),
    "scale-divided": lambda self, q, k, v, m: plain(product(q, k) / math.sqrt(4) + additive(q, m), v),
    "scale-on-query": lambda self, q, k, v, m: plain(product(q * 0.5, k) + additive(q, m), v),
    "scale-on-both": lambda self, q, k, v, m: plain(product(q * 0.5**0.5, k / 2**0.5) + additive(q, m), v),
    "scale-a-tensor": lambda self, q, k, v, m: plain(product(q, k) / torch.full([], 2.0) + additive(q, m), v),
    "mask-before-scale": lambda self, q, k, v, m: plain((product(q, k) + additive(q, m)) / 2.0, v),
    "mask-first": lambda self, q, k, v, m: plain(additive(q, m) + 0.5 * product(q, k), v),
    "mask-subtracted": lambda self, q, k, v, m: plain(product(q, k) * 0.5 - additive(q, m).neg(), v),
    "masked-fill": lambda self, q, k, v, m: plain(
        (product(q, k) * 0.5).masked_fill(~(causal_mask(q) & m.bool()[:, None, None]), LEAST), v
    ),
    "two-fills": lambda self, q, k, v, m: plain(
        (product(q, k) * 0.5)
        .masked_fill(~causal_mask(q), -torch.inf)
        .masked_fill((1 - m)[:, None, None].bool(), LEAST),
        v,
    ),
    "where": lambda self, q, k, v, m: plain(
        torch.where(causal_mask(q) & (m != 0)[:, None, None], product(q, k) * 0.5, LEAST), v
    ),
    "where-turned": lambda self, q, k, v, m: plain(
        torch.where(causal_mask(q) & (m != 0)[:, None, None], product(q, k) * 0.5, torch.tensor(-1e9)), v
    ),
    "ten-thousand": lambda self, q, k, v, m: plain(
        product(q, k) * 0.5 + (1.0 - (causal_mask(q) * m[:, None, None].float())) * -1e4, v
    ),
    "float-softmax": lambda self, q, k, v, m: (
        torch.softmax((product(q, k) * 0.5 + additive(q, m)).float(), dim=3, dtype=torch.float32).to(q.dtype) @ v
    ),
    "bounded": lambda self, q, k, v, m: plain(torch.max(product(q, k) * 0.5 + additive(q, m), torch.tensor(LEAST)), v),
    "dropout": lambda self, q, k, v, m: (
        nn.functional.dropout((product(q, k) * 0.5 + additive(q, m)).softmax(-1), 0.5, False) @ v
    ),
    "key-permuted": lambda self, q, k, v, m: plain(q @ k.permute(0, 1, 3, 2) * 0.5 + additive(q, m), v),
    "key-made-turned": lambda self, q, k, v, m: plain(
        q @ k.transpose(1, 2).permute(0, 2, 3, 1) * 0.5 + additive(q, m), v
    ),
    "folded": lambda self, q, k, v, m: torch.bmm(
        (torch.bmm(folded(q), folded(k).transpose(1, 2)).view(*q.shape[:3], -1) * 0.5 + additive(q, m))
        .softmax(-1)
        .view(-1, q.shape[2], q.shape[2]),
        folded(v),
    ).view(q.shape),
    "folded-sum": lambda self, q, k, v, m: torch.bmm(
        torch.baddbmm(
            additive(q, m).expand(-1, 4, -1, -1).reshape(-1, q.shape[2], q.shape[2]),
            folded(q),
            folded(k).transpose(1, 2),
            alpha=0.5,
        ).softmax(-1),
        folded(v),
    ).view(q.shape),
    "arange": lambda self, q, k, v, m: plain(
        (product(q, k) * 0.5).masked_fill(
            (torch.arange(q.shape[2])[None] > torch.arange(q.shape[2])[:, None]) | (m == 0)[:, None, None], LEAST
        ),
        v,
    ),
    "einsum": lambda self, q, k, v, m: torch.einsum(
        "bhts,bhsd->bhtd", (torch.einsum("bhtd,bhsd->bhts", q, k) * 0.5 + additive(q, m)).softmax(-1), v
    ),
    "sdpa": lambda self, q, k, v, m: scaled_dot_product_attention(q, k, v, attn_mask=additive(q, m)),
    "sdpa-bool": lambda self, q, k, v, m: scaled_dot_product_attention(
        q, k, v, attn_mask=causal_mask(q) & m.bool()[:, None, None]
    ),
}

# Here a query in left padding, which may see nothing, gets something else than the mean of all values.
BLIND = ("two-fills", "ten-thousand", "sdpa-bool")


@pytest.mark.parametrize("way", WAYS)
def test_attention_by_hand_in_many_ways(way: str) -> None:
    found, reasons, program = by_hand(WAYS[way], verify=1 if way in BLIND else 2)
    assert reasons == []
    assert len(found) == 1
    assert found[0].endswith(CAUSAL), found
    assert "softmax" not in str(program)
    # Nothing lies between the layers and the op but the model's own reshapes.
    left = [op_name(node) for node in program.graph.nodes if node.op == "call_function"]
    assert sorted({*left}) == ["linear", "reshape", "skink.attention", "sym_size", "to", "transpose"]
    assert left.count("transpose") == left.count("reshape") == 3


def sink_column(self: Any, q: Tensor) -> Tensor:
    return self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)


def with_sinks(self: Any, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """As gpt-oss writes it."""
    scores = torch.cat([product(q, k) * 0.5 + additive(q, m), sink_column(self, q)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return torch.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-1] @ v


def beside_sinks(self: Any, q: Tensor, scores: Tensor, after: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    return after(torch.cat([scores, sink_column(self, q)], -1)).softmax(-1)[..., :-1] @ v


def slopes(count: int = 4) -> Tensor:
    return torch.pow(2.0, -torch.arange(1, count + 1, dtype=torch.float32))


def ahead(q: Tensor) -> Tensor:
    """Key position less query position."""
    position = torch.arange(q.shape[2])
    return position[None] - position[:, None]


def counted(m: Tensor) -> Tensor:
    """As Bloom counts: along the tokens that are there, [B, H, 1, T]."""
    return (slopes()[None, :, None] * ((m.cumsum(-1) - 1) * m)[:, None, :])[:, :, None]


def near(q: Tensor, window: int) -> Tensor:
    return causal_mask(q) & (ahead(q) > -window)


FORMS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "sinks": (with_sinks, "causal=True, scale=0.5, sinks=@sinks)"),
    "soft-cap": (
        lambda self, q, k, v, m: plain(torch.tanh(product(q, k) * 0.5 / 3.0) * 3.0 + additive(q, m), v),
        "causal=True, scale=0.5, softcap=3.0)",
    ),
    "soft-cap-of-one": (
        lambda self, q, k, v, m: plain(torch.tanh(product(q, k) * 0.5) + additive(q, m), v),
        "causal=True, scale=0.5, softcap=1.0)",
    ),
    "alibi": (
        lambda self, q, k, v, m: plain(product(q, k) * 0.5 + slopes()[:, None, None] * ahead(q) + additive(q, m), v),
        "causal=True, scale=0.5, alibi=@alibi_slopes)",
    ),
    "alibi-counted": (
        lambda self, q, k, v, m: plain(product(q, k) * 0.5 + counted(m) + additive(q, m), v),
        "causal=True, scale=0.5, alibi=@alibi_slopes)",
    ),
    "alibi-from-the-end": (
        lambda self, q, k, v, m: plain(
            product(q, k) * 0.5
            + slopes()[:, None, None] * torch.arange(1 - q.shape[2], 1)[None, None]
            + additive(q, m),
            v,
        ),
        "causal=True, scale=0.5, alibi=@alibi_slopes)",
    ),
    "alibi-folded": (
        lambda self, q, k, v, m: torch.bmm(
            (
                torch.baddbmm(
                    counted(m).reshape(-1, 1, q.shape[2]), folded(q), folded(k).transpose(1, 2), beta=2.0, alpha=0.5
                ).view(-1, 4, q.shape[2], q.shape[2])
                + additive(q, m)
            )
            .softmax(-1)
            .flatten(0, 1),
            folded(v),
        ).view(q.shape),
        "causal=True, scale=0.5, alibi=@alibi_slopes)",
    ),
    "window": (
        lambda self, q, k, v, m: plain(
            (product(q, k) * 0.5).masked_fill(~(near(q, 3) & m.bool()[:, None, None]), LEAST), v
        ),
        "causal=True, scale=0.5, window=3)",
    ),
    "long-window": (
        lambda self, q, k, v, m: plain(
            (product(q, k) * 0.5).masked_fill(~(near(q, 1000) & m.bool()[:, None, None]), LEAST), v
        ),
        "causal=True, scale=0.5, window=1000)",
    ),
    "both-ways": (
        lambda self, q, k, v, m: plain(product(q, k) * 0.5 + (1 - m)[:, None, None] * LEAST, v),
        "causal=False, scale=0.5)",
    ),
    "no-mask": (lambda self, q, k, v, m: plain(product(q, k) * 0.5, v) + 0 * m.sum(), "causal=False, scale=0.5)"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_attention_by_hand(form: str) -> None:
    weigh, ending = FORMS[form]
    found, reasons, program = by_hand(weigh)
    assert (len(found), reasons) == (1, [])
    assert found[0].replace("%sinks", "@sinks").endswith(ending), found
    if "alibi" in form:
        wanted = slopes() * (2.0 if form == "alibi-folded" else 1.0)
        torch.testing.assert_close(program.weight("alibi_slopes"), wanted)


SHARED: dict[str, Callable[..., Tensor]] = {
    "expand": lambda self, q, k, v, m: plain(product(q, repeated(k, 2)) * 0.5 + additive(q, m), repeated(v, 2)),
    "repeat_interleave": lambda self, q, k, v, m: plain(
        product(q, k.repeat_interleave(2, 1)) * 0.5 + additive(q, m), v.repeat_interleave(2, dim=1)
    ),
    "sdpa": lambda self, q, k, v, m: scaled_dot_product_attention(q, repeated(k, 2), repeated(v, 2), additive(q, m)),
    "sdpa-grouped": lambda self, q, k, v, m: scaled_dot_product_attention(q, k, v, additive(q, m), enable_gqa=True),
}


@pytest.mark.parametrize("way", SHARED)
def test_repeated_keys_are_read_once(way: str) -> None:
    found, reasons, program = by_hand(SHARED[way], kv_heads=2)
    assert (len(found), reasons) == (1, [])
    (node,) = (node for node in program.graph.nodes if op_name(node) == "skink.attention")
    assert [int(argument.meta["val"].shape[1]) for argument in node.args[:3]] == [4, 2, 2]


def test_one_key_head_for_all_queries() -> None:
    found, reasons, _ = by_hand(WAYS["scale-after"], kv_heads=1)
    assert (len(found), reasons) == (1, [])


def tiled(x: Tensor) -> Tensor:
    """Heads 0, 1, 0, 1: not what sharing means."""
    return x[:, None].expand(-1, 2, -1, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


def test_keys_repeated_unevenly_are_not_shared_ones() -> None:
    def weigh(self: Any, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        times = {"repeats": self.times, "dim": 1, "output_size": 4}
        return plain(product(q, k.repeat_interleave(**times)) + additive(q, m), v.repeat_interleave(**times))

    _, _, program = by_hand(weigh, kv_heads=2, times=torch.tensor([3, 1]))
    (node,) = (node for node in program.graph.nodes if op_name(node) == "skink.attention")
    assert [int(argument.meta["val"].shape[1]) for argument in node.args[:3]] == [4, 4, 4]


def test_a_number_taken_from_the_scores_changes_nothing() -> None:
    found, reasons, _ = by_hand(lambda self, q, k, v, m: plain(product(q, k) * 0.5 - 1.0 + additive(q, m), v))
    assert (len(found), reasons) == (1, [])
    assert found[0].endswith("causal=True, scale=0.5)")


def test_keys_that_were_whole_numbers_stay_so() -> None:
    def weigh(self: Any, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        whole = (k * 9).transpose(-1, -2).to(torch.int32).float()
        return plain(q @ whole * 0.1 + additive(q, m), (repeated(v * 3, 1)).to(torch.int32).float())

    found, _, program = by_hand(weigh)
    assert len(found) == 1
    assert str(program).count(": i32[") == 2


def test_tiled_keys_are_not_shared_ones() -> None:
    weigh = lambda self, q, k, v, m: plain(product(q, tiled(k)) * 0.5 + additive(q, m), tiled(v))  # noqa: E731
    _, _, program = by_hand(weigh, kv_heads=2)
    (node,) = (node for node in program.graph.nodes if op_name(node) == "skink.attention")
    assert [int(argument.meta["val"].shape[1]) for argument in node.args[:3]] == [4, 4, 4]


NEAR_MISSES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "unknown-op": (
        lambda self, q, k, v, m: plain(torch.sigmoid(product(q, k)) + additive(q, m), v),
        "sigmoid on the scores' way to the softmax is not understood",
    ),
    "factor": (
        lambda self, q, k, v, m: plain(product(q, k) * q.sum(-1, keepdim=True) + additive(q, m), v),
        "scores are multiplied by something that is no number",
    ),
    "divisor": (
        lambda self, q, k, v, m: plain(product(q, k) / self.sinks[:, None, None] + additive(q, m), v),
        "scores are divided by something that is no number",
    ),
    "trained-bias": (
        lambda self, q, k, v, m: plain(product(q, k) + self.sinks[:, None, None] + additive(q, m), v),
        "the mask rests on the trained weight sinks",
    ),
    "bias": (
        lambda self, q, k, v, m: plain(product(q, k) + ahead(q).float().sin() + additive(q, m), v),
        "the scores gain a bias that is not ALiBi's",
    ),
    "chunks": (
        lambda self, q, k, v, m: plain(
            (product(q, k)).masked_fill(
                ~(causal_mask(q) & (torch.arange(q.shape[2])[:, None] // 3 == torch.arange(q.shape[2])[None] // 3)),
                LEAST,
            )
            + 0 * m[:, None, None],
            v,
        ),
        "the mask is none of causal, causal with a window, and all",
    ),
    "by-head": (
        lambda self, q, k, v, m: plain(
            product(q, k).masked_fill(~causal_mask(q) & (torch.arange(4) > 0)[:, None, None], LEAST)
            + 0 * m[:, None, None],
            v,
        ),
        "the mask treats some heads, padding or lengths in a way of its own",
    ),
    "huge-window": (
        lambda self, q, k, v, m: plain(
            product(q, k).masked_fill(~(near(q, 20000) & m.bool()[:, None, None]), LEAST), v
        ),
        "the mask may have a window of 20000, and 8192 is the most tried",
    ),
    "cap-after-mask": (
        lambda self, q, k, v, m: plain(torch.tanh(product(q, k) + additive(q, m)) * 3.0, v),
        "the soft cap comes after a mask or another cap",
    ),
    "bounded": (
        lambda self, q, k, v, m: plain((product(q, k) + additive(q, m)).clamp(min=-5.0), v),
        "scores are bounded",
    ),
    "two-sinks": (
        lambda self, q, k, v, m: (
            torch.cat([product(q, k) + additive(q, m), sink_column(self, q), sink_column(self, q)], -1).softmax(-1)[
                ..., :-2
            ]
            @ v
        ),
        "more than one more score is joined to each row",
    ),
    "sinks-by-token": (
        lambda self, q, k, v, m: torch.cat([product(q, k) + additive(q, m), q[..., :1]], -1).softmax(-1)[..., :-1] @ v,
        "the sinks are not one number for each head",
    ),
    "scaled-sinks": (
        lambda self, q, k, v, m: beside_sinks(self, q, product(q, k) + additive(q, m), lambda s: s * 0.3, v),
        "mul changes scores to which a sink is joined",
    ),
    "capped-sinks": (
        lambda self, q, k, v, m: beside_sinks(self, q, product(q, k), torch.tanh, v),
        "tanh changes scores to which a sink is joined",
    ),
    "sinks-and-a-sum": (
        lambda self, q, k, v, m: beside_sinks(
            self, q, product(q, k), lambda s: s + nn.functional.pad(additive(q, m), (0, 1)), v
        ),
        "add changes scores to which a sink is joined",
    ),
    "sinks-and-a-difference": (
        lambda self, q, k, v, m: beside_sinks(
            self, q, product(q, k), lambda s: s - nn.functional.pad(-additive(q, m), (0, 1)), v
        ),
        "sub changes scores to which a sink is joined",
    ),
    "largest-before-sinks": (
        lambda self, q, k, v, m: beside_sinks(
            self, q, without_largest(product(q, k) + additive(q, m)), lambda s: s * 1, v
        ),
        "each row's largest score is taken from it before a sink is joined",
    ),
    "constant-before-sinks": (
        lambda self, q, k, v, m: beside_sinks(self, q, product(q, k) + 2.0 + additive(q, m), lambda s: s, v),
        "something is added to the scores before a sink is joined",
    ),
    "rows-before-sinks": (
        lambda self, q, k, v, m: beside_sinks(
            self, q, product(q, k) + torch.arange(q.shape[2])[:, None] * 0.3 + additive(q, m), lambda s: s, v
        ),
        "something is added to the scores before a sink is joined",
    ),
    "slopes-from-the-first-key-before-sinks": (
        lambda self, q, k, v, m: beside_sinks(
            self, q, product(q, k) + torch.arange(q.shape[2]) * 0.3 + additive(q, m), lambda s: s, v
        ),
        "something is added to the scores before a sink is joined",
    ),
    "largest-before-cap": (
        lambda self, q, k, v, m: plain(torch.tanh(without_largest(product(q, k))) * 3.0 + additive(q, m), v),
        "each row's largest score is taken from it before the soft cap",
    ),
    "alpha": (
        lambda self, q, k, v, m: plain(torch.add(product(q, k), additive(q, m), alpha=2), v),
        "what is added to the scores is multiplied first",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_of_attention_by_hand(case: str) -> None:
    weigh, reason = NEAR_MISSES[case]
    found, reasons, _ = by_hand(weigh, verify=1)
    assert (found, reasons) == ([], [reason])


def test_a_softmax_that_weighs_no_keys_is_left_alone() -> None:
    found, reasons, _ = by_hand(lambda self, q, k, v, m: q.softmax(-1) @ torch.eye(4) + 0 * m[:, None, :, None])
    assert (found, reasons) == ([], ["transpose on the scores' way to the softmax is not understood"])
