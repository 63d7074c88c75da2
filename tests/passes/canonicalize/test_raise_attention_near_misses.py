"""Attention written by hand that is not raised, each with the reason."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.passes.canonicalize.by_hand import (
    LEAST,
    additive,
    ahead,
    beside_sinks,
    by_hand,
    causal_mask,
    near,
    plain,
    product,
    sink_column,
    without_largest,
)

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
