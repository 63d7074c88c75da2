import pytest
import torch
from torch import nn

from skink.graph.pipeline import Pipeline
from skink.graph.rewriter import Rewriter
from skink.passes.decompose import BasisSharing, LowRank, ReduceWidth, Tucker
from skink.passes.decompose.factorize.pivoted import pivoted
from skink.passes.decompose.replacement import (
    factored,
    free_prefix,
    replace_by_factors,
    replace_by_pivots,
    replace_by_shared_input,
)
from skink.passes.decompose.selection import linear_layers
from tests.graph.programs import canonical
from tests.passes.decompose.programs import Block, captured, text

FACTORS = [f"first.{name}.{kind}" for name in ("kept", "rest") for kind in ("weight", "bias")]


class Three(nn.Module):
    """Three layers on one input, one of them without a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 12), nn.Linear(16, 8, bias=False), nn.Linear(16, 8)

    def forward(self, x):
        return torch.cat([torch.tanh(self.a(x)), self.b(x), self.c(x)], -1)


class Borrowed(nn.Module):
    """One weight read twice, with biases of its own and of another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def exact(program, layer, rank):
    u, s, v = torch.linalg.svd(program.weight(layer.weight).double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]).float(), v[:rank].float()


def prepared(module):
    program = captured(module, 3, 16).clone()
    return program, Rewriter(program, "test"), linear_layers(program)


def finished(program, rewriter):
    rewriter.finish()
    return program(torch.ones(2, 16).cumsum(1) / 16)[0]


@pytest.mark.parametrize("module", [Block(), Block(bias=False), Borrowed(), Three()])
@pytest.mark.parametrize("form", ["thin", "core", "pivoted"])
def test_at_full_rank_nothing_changes(module, form):
    program, rewriter, layers = prepared(module)
    before = program(torch.ones(2, 16).cumsum(1) / 16)[0]
    for layer in layers:
        # One less than full where pivots need a row that is none: then the last direction must be empty.
        up, down = exact(program, layer, min(layer.shape))
        if form == "pivoted" and layer.shape[0] > min(layer.shape):
            assert replace_by_pivots(program, rewriter, [layer], pivoted(up, down))
        elif form == "core":
            core = torch.diag(torch.linspace(1, 2, len(down)))
            assert replace_by_factors(program, rewriter, layer, up @ torch.linalg.inv(core), down, core=core)
        else:
            assert replace_by_factors(program, rewriter, layer, up, down)
    torch.testing.assert_close(finished(program, rewriter), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["thin", "pivoted"])
def test_layers_that_share_the_factor_of_their_input(form):
    program, rewriter, layers = prepared(Three())
    before = program(torch.ones(2, 16).cumsum(1) / 16)[0]
    weight = torch.cat([program.weight(layer.weight) for layer in layers])
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    up, down = (u * s).float(), v.float()
    if form == "thin":
        assert replace_by_shared_input(program, rewriter, layers, up.split([12, 8, 8]), down)
        expected = {"a.down.weight", "a.up.weight", "a.up.bias", "b.up.weight", "c.up.weight", "c.up.bias"}
    else:
        assert replace_by_pivots(program, rewriter, layers, pivoted(up, down))
        expected = {"a.kept.weight", "a.kept.bias", "a.rest.weight", "a.rest.bias", "a.order"}
    torch.testing.assert_close(finished(program, rewriter), before, rtol=1e-4, atol=1e-5)
    assert dict(program.weights()).keys() == expected
    assert len(program.edits) == 1
    assert program.buffers == {name for name in expected if "order" in name}


def test_pivots_as_text():
    program, rewriter, layers = prepared(Block())
    up, down = exact(program, layers[0], 5)
    replace_by_pivots(program, rewriter, layers[:1], pivoted(up, down))
    rewriter.finish()
    expected = """
program canonical(%x: f32[B,16])
  %linear_default : f32[B,5] = aten.linear(%x, @first.kept.weight, @first.kept.bias)
  %linear_default_1 : f32[B,19] = aten.linear(%linear_default, @first.rest.weight, @first.rest.bias)
  %cat_default : f32[B,24] = aten.cat([%linear_default, %linear_default_1], -1)
  %index_select_default : f32[B,24] = aten.index_select(%cat_default, -1, @first.order)
  %relu : f32[B,24] = aten.relu(%index_select_default)
  %linear_1 : f32[B,16] = aten.linear(%relu, @second.weight, @second.bias)
  return output_0=%linear_1
"""
    assert str(program).replace("  # linear-to-low-rank", "") == expected.strip()
    assert free_prefix(program, "first.weight") == "first_factored."
    assert free_prefix(program, "first.weight", "first.order", *FACTORS) == "first."


@pytest.mark.parametrize("form", ["thin", "shared", "pivoted"])
def test_a_refused_edit_leaves_the_dense_weight(form):
    program, _, layers = prepared(Three())
    rewriter = Rewriter(program, "test", limit=0)
    up, down = exact(program, layers[0], 4)
    if form == "thin":
        done = replace_by_factors(program, rewriter, layers[0], up, down)
    elif form == "shared":
        done = replace_by_shared_input(program, rewriter, layers[:1], [up], down)
    else:
        done = replace_by_pivots(program, rewriter, layers[:1], pivoted(up, down))
    rewriter.finish()
    assert not done
    assert set(dict(program.weights())) == {"a.weight", "a.bias", "b.weight", "c.weight", "c.bias"}


def test_names_that_are_free():
    program, _, layers = prepared(Block())
    assert free_prefix(program, "first.weight") == "first."
    assert free_prefix(program, "matrix") == "matrix_factored."
    record = factored(layers[0], 3, 120, predicted_loss=0.25)
    assert (record.decision, record.rank, record.parameters_after, record.predicted_loss) == ("factored", 3, 120, 0.25)


@pytest.mark.parametrize("cut_short", [0, 1, 3, None])
@pytest.mark.parametrize(
    "options",
    [
        LowRank(keep=0.5),
        LowRank(keep=0.5, form="thin", allocation="uniform", share_inputs=True),
        BasisSharing(keep=0.6, method="whitened"),
        Tucker(rank=0.5),
        ReduceWidth(keep=0.8),
    ],
    ids=str,
)
def test_a_pass_claims_no_more_than_its_edits_did(options, cut_short):
    program = canonical("llama").clone()
    before = sum(tensor.numel() for _, tensor in program.weights())
    limit = None if cut_short is None else len(program.edits) + cut_short
    done = Pipeline((options,), start=program.stage).attempt(program, calibration=text(), verify=1, limit=limit)
    assert done.error is None
    claimed = sum(
        record.parameters_before - record.parameters_after
        for record in (done.result.passes[0].result.layers if done.result.passes else ())
    )
    # Integers that say where outputs or columns are, and no parameters.
    places = sum(tensor.numel() for name, tensor in program.weights() if name.endswith((".order", ".rotary_columns")))
    assert before - claimed == sum(tensor.numel() for _, tensor in program.weights()) - places
