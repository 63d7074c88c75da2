import pytest
import torch
from torch import nn

from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose.reduce_width.attention import Branch, attentions, pairs
from tests.graph.programs import canonical


def first(family, **options):
    return next(attentions(canonical(family, **options)))


def features(heads, width, *, start=0, apart=None):
    """Rows of heads that lie `apart` from each other."""
    return [[start + h * (apart or width) + d for d in range(width)] for h in range(heads)]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", (features(4, 16), features(2, 16), features(2, 16))),
        ("phi3", (features(4, 16), features(2, 16, start=64), features(2, 16, start=96))),
        ("gpt2", (features(4, 16), features(4, 16, start=64), features(4, 16, start=128))),
        # One head's queries, keys and values lie together.
        ("gpt_neox", tuple(features(4, 16, start=start, apart=48) for start in (0, 16, 32))),
    ],
)
def test_which_row_is_which_feature(family, expected):
    found = first(family)
    branches = (found.query, found.key, found.value)
    assert tuple(branch.rows.tolist() for branch in branches) == expected
    assert found.columns.tolist() == features(4, 16)
    assert (found.scores_reason(), found.value_reason()) == ("", "")
    assert found.fused == (family != "llama")


def test_a_factor_before_the_heads_is_kept():
    assert first("opt").query.factor == 0.25
    assert first("opt").key.factor == 1.0


def test_pairs_that_rotary_turns():
    assert pairs(first("llama").query) == ([(i, i + 8) for i in range(8)], 16)
    assert pairs(first("gpt_neox").query) == ([(0, 2), (1, 3)], 4)
    assert pairs(first("gpt2").query) == ([], 0)


def test_norms_of_heads_are_refused_by_name():
    found = first("qwen3")
    assert found.scores_reason() == "rms_norm stands between the projection and attention"
    assert found.value_reason() == ""


class Odd(nn.Module):
    """Attention whose heads are made in a way of the test's own."""

    def __init__(self, make, join=None):
        super().__init__()
        self.qkv, self.out, self.make, self.join = nn.Linear(8, 24), nn.Linear(8, 8), make, join

    def forward(self, x):
        query, key, value = self.make(self.qkv(x))
        y = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        y = y.transpose(1, 2) if self.join is None else self.join(y)
        return self.out(y.reshape(x.shape[0], x.shape[1], 8))


def heads(x, width=4):
    return x.reshape(x.shape[0], x.shape[1], -1, width).transpose(1, 2)


def odd(make, join=None):
    program = capture(Odd(make, join).eval(), (torch.randn(2, 6, 8),), dims={"x": {0: "B", 1: "T"}})
    Pipeline((Canonicalize(),)).run(program, verify=0)
    [found] = attentions(program)
    return found


def test_heads_that_take_other_tokens_are_refused():
    # Without the transposition a head gets numbers of several tokens.
    found = odd(lambda y: [part.reshape(part.shape[0], 2, part.shape[1], 4) for part in y.chunk(3, -1)])
    assert found.value_reason() == "heads are not folded out of the projection as [B, T, H, D]"
    assert found.scores_reason() == "heads are not folded out of the projection as [B, T, H, D]"


def test_what_computes_in_between_is_refused():
    found = odd(lambda y: [heads(part.tanh()) for part in y.chunk(3, -1)])
    assert found.value_reason() == "tanh stands between the projection and attention"


def test_results_that_are_gated_are_refused():
    found = odd(lambda y: [heads(part) for part in y.chunk(3, -1)], lambda y: y.transpose(1, 2).sigmoid())
    assert found.value_reason() == "sigmoid stands between attention and the projection after it"
    assert found.scores_reason() == ""


def test_heads_that_alternate_are_understood():
    found = odd(lambda y: [heads(part) for part in y.reshape(*y.shape[:-1], 8, 3).unbind(-1)])
    assert isinstance(found.value, Branch)
    assert found.value.rows.tolist() == [[2, 5, 8, 11], [14, 17, 20, 23]]


def test_a_projection_that_something_else_reads_is_refused():
    def make(y):
        query, key, value = (heads(part) for part in y.chunk(3, -1))
        return query, key, value + y.sum() * 0

    assert "stands between" in odd(make).value_reason()
    assert odd(make).scores_reason() == "sum reads the projection too"
