import pytest
import torch
from torch import nn

from skink.graph.blocks import feed_forward_blocks
from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.graph.rewriter import Rewriter
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose.reduce_width.attention import attentions
from skink.passes.decompose.reduce_width.edits import Heads, narrow_attention, narrow_feed_forward
from skink.passes.decompose.reduce_width.parts import branch_of, heads_of
from tests.graph.programs import canonical
from tests.passes.decompose.reduce_width.test_reduce_width import logits, text


class Fused(nn.Module):
    """Gate and up in one product, cut in a way of the test's own."""

    def __init__(self, cut):
        super().__init__()
        torch.manual_seed(0)
        self.both, self.down, self.cut = nn.Linear(6, 20), nn.Linear(10, 6), cut

    def forward(self, x):
        gate, up = self.cut(self.both(x))
        return x + self.down(nn.functional.silu(gate) * up)


@pytest.mark.parametrize(
    "cut",
    [
        lambda y: y.chunk(2, -1),
        lambda y: y.split(10, -1),
        lambda y: y.split([10, 10], -1),
        lambda y: (y[..., :10], y[..., 10:]),
        lambda y: (y[..., 10:], y[..., :10]),
    ],
    ids=["chunk", "split", "sizes", "slices", "swapped"],
)
def test_gate_and_up_are_cut_where_they_now_meet(cut):
    block, kept, x = Fused(cut).eval(), [0, 2, 3, 7], torch.randn(3, 6)
    program = capture(block, (torch.randn(3, 6),))
    Pipeline((Canonicalize(),)).run(program, verify=0)
    [found] = feed_forward_blocks(program)
    rows = [*kept, *(10 + channel for channel in kept)]
    new = {
        "both.weight": block.both.weight.detach()[rows],
        "both.bias": block.both.bias.detach()[rows],
        "down.weight": block.down.weight.detach()[:, kept],
    }
    rewriter = Rewriter(program, "test")
    assert narrow_feed_forward(program, rewriter, found, new, 4, "4 of 10")
    rewriter.finish()
    with torch.no_grad():
        gate, up = cut(block.both(x))
        hidden = nn.functional.silu(gate)[:, kept] * up[:, kept]
        expected = x + nn.functional.linear(hidden, block.down.weight[:, kept], block.down.bias)
    torch.testing.assert_close(program(x)[0], expected, rtol=1e-5, atol=1e-6)
    assert program.edits[-1].detail == "4 of 10"
    assert program.weight("both.weight").shape == (8, 6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "opt"])
def test_an_attention_made_anew_as_it_was_computes_the_same(family):
    program = canonical(family).clone()
    rewriter = Rewriter(program, "test")
    for found in list(attentions(program)):
        heads = {name: heads_of(program, branch_of(found, name)) for name in ("query", "key", "value")}
        output = program.weight(str(found.output.args[1].target))[:, found.columns.flatten()]
        assert narrow_attention(program, rewriter, found, heads, output, None, "")
    rewriter.finish()
    assert rewriter.count == 2
    torch.testing.assert_close(logits(program, text(2)), logits(canonical(family), text(2)), rtol=1e-4, atol=1e-5)


def test_widths_of_keys_and_values_may_differ():
    program = canonical("llama").clone()
    rewriter = Rewriter(program, "test")
    found = next(attentions(program))
    value = heads_of(program, branch_of(found, "value"))
    rows = [0, 1, 2, 16, 17, 18]
    columns = [16 * head + feature for head in range(4) for feature in range(3)]
    output = program.weight(str(found.output.args[1].target))[:, columns]
    heads = {"value": Heads(value.weight[rows], None, 2)}
    assert heads["value"].width == 3
    assert narrow_attention(program, rewriter, found, heads, output, None, "")
    rewriter.finish()
    # The same as zeros in the place of what went.
    other = canonical("llama").clone()
    whole = other.weight("model.layers.0.self_attn.v_proj.weight")
    other.set_weight(
        "model.layers.0.self_attn.v_proj.weight", torch.zeros_like(whole).index_copy(0, torch.tensor(rows), whole[rows])
    )
    torch.testing.assert_close(logits(program, text(2)), logits(other, text(2)), rtol=1e-4, atol=1e-5)
    assert "f32[B,2,T,3]" in str(program)


def test_a_limit_that_is_reached_leaves_the_weights_alone():
    program = canonical("llama").clone()
    rewriter = Rewriter(program, "test", limit=len(program.edits))
    found = next(attentions(program))
    value = heads_of(program, branch_of(found, "value"))
    before = str(program)
    assert not narrow_attention(program, rewriter, found, {"value": value}, None, None, "")
    [block, _] = feed_forward_blocks(program)
    assert not narrow_feed_forward(program, rewriter, block, {block.up.weight: torch.zeros(1, 64)}, 1, "")
    assert str(program) == before
    assert program.weight(block.up.weight).shape == (128, 64)
