"""Raising of attention that a model writes by hand: the ways, the forms, and keys that queries share."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from skink.graph.pattern import op_name
from tests.passes.canonicalize.by_hand import (
    LEAST,
    additive,
    ahead,
    by_hand,
    causal_mask,
    folded,
    near,
    plain,
    product,
    repeated,
    sink_column,
    slopes,
)

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


def with_sinks(self: Any, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """As gpt-oss writes it."""
    scores = torch.cat([product(q, k) * 0.5 + additive(q, m), sink_column(self, q)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return torch.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-1] @ v


def counted(m: Tensor) -> Tensor:
    """As Bloom counts: along the tokens that are there, [B, H, 1, T]."""
    return (slopes()[None, :, None] * ((m.cumsum(-1) - 1) * m)[:, None, :])[:, :, None]


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
