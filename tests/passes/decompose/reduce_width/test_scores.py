from functools import cache

import pytest
import torch

from skink.graph.capture import capture
from skink.graph.gradients import stream_moments
from skink.graph.pipeline import Pipeline
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose.reduce_width.finding import find_parts, input_means
from skink.passes.decompose.reduce_width.parts import means
from skink.passes.decompose.selection import choose_layers
from tests.graph.programs import canonical
from tests.models import build
from tests.passes.decompose.reduce_width.test_reduce_width import ReduceWidth, logits, run, text


def score_rows(model, family, layer):
    """(queries' weight, rows of feature d of every head) of one layer of a transformers model, and the keys'."""
    if family == "gpt_neox":
        both = model.gpt_neox.layers[layer].attention.query_key_value
        return [(both, lambda d, start=start: [h * 48 + start + d for h in range(4)]) for start in (0, 16)]
    if family == "gpt2":
        # Transposed: columns are outputs.
        both = model.transformer.h[layer].attn.c_attn
        return [(both, lambda d, start=start: [start + h * 16 + d for h in range(4)]) for start in (0, 64)]
    attention = model.model.layers[layer].self_attn
    queries, keys = attention.q_proj, attention.k_proj
    return [(queries, lambda d: [h * 16 + d for h in range(4)]), (keys, lambda d: [h * 16 + d for h in range(2)])]


@cache
def emptied(family, features):
    """A model whose queries are zero at some features of every head, and its canonical program."""
    model = build(family)
    with torch.no_grad():
        for layer in range(2):
            projection, rows = score_rows(model, family, layer)[0]
            for feature in features:
                weight = projection.weight.T if family == "gpt2" else projection.weight
                weight[rows(feature)] = 0.0
                if projection.bias is not None:
                    projection.bias[rows(feature)] = 0.0
    program = capture(model)
    Pipeline((Canonicalize(),)).run(program, verify=0)
    return program


@pytest.mark.parametrize(
    ("family", "features", "width"),
    [
        ("llama", (1, 9, 6, 14), 12),  # rotary pairs are 8 apart
        ("gpt_neox", (1, 3, 7, 12), 12),  # 4 of 16 features are turned, in pairs 2 apart
        ("gpt2", (0, 5, 11, 15), 12),  # none is turned
    ],
)
def test_features_that_do_not_count_go_and_logits_stay(family, features, width):
    program = emptied(family, features)
    options = ReduceWidth(keep=0.5, parts=("query-key",), floor=width / 16, multiple_of=2)
    total, part = parameters(program)
    options = ReduceWidth(**{**options.options(), "keep": 1 - part * (1 - width / 16) / total + 1e-9})
    result, changed = run(program, options)
    assert result.edits == 2
    torch.testing.assert_close(logits(changed, text(3)), logits(program, text(3)), rtol=1e-4, atol=1e-5)
    predicted = [layer.predicted_loss for layer in result.layers if layer.predicted_loss is not None]
    assert max(predicted) < 1e-12
    scales = {node.kwargs["scale"] for node in changed.graph.nodes if str(node.target) == "skink.attention.default"}
    assert scales == {0.25}  # of the 16 features that there were


def parameters(program):
    """Parameters of the targets, and of queries' and keys' projections."""
    choice, _ = choose_layers(program, "test", (), ())
    parts = find_parts(program, choice, ("query-key",), "two-sided")
    whole = sum(layer.parameters for layer in choose_layers(program, "test", (), ())[0])
    return whole, sum(out * in_ for part in parts for _, out, in_ in part.shapes(part.width))


def test_tables_lose_the_columns_of_the_pairs_that_went():
    program = emptied("llama", (1, 9, 6, 14))
    _, part = parameters(program)
    total, _ = parameters(program)
    _, changed = run(
        program, ReduceWidth(keep=1 - part / total / 4 + 1e-9, parts=("query-key",), multiple_of=4, floor=0.75)
    )
    kept = [0, 2, 3, 4, 5, 7]
    for layer in range(2):
        columns = changed.weight(f"model.layers.{layer}.self_attn.rotary_columns")
        assert columns.tolist() == [*kept, *(feature + 8 for feature in kept)]
        assert f"model.layers.{layer}.self_attn.rotary_columns" in changed.buffers
    rows = [head * 16 + feature for head in range(4) for feature in columns.tolist()]
    expected = program.weight("model.layers.0.self_attn.q_proj.weight")[rows]
    assert torch.equal(changed.weight("model.layers.0.self_attn.q_proj.weight"), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_price_is_what_both_sides_say_of_the_change(family):
    program = canonical(family)
    choice, _ = choose_layers(program, "test", (), ())
    part = find_parts(program, choice, ("query-key",), "two-sided")[0]
    moments = {}
    for found in stream_moments(program, text(), part.prices_need):
        moments.update(found)
    inputs, gradients = means(moments)
    part.mean = input_means(program, part.prices_need, text(), None)[part.prices_need[0]]
    part.plan(program, inputs, gradients)
    for width in (14, 8):
        expected = 0.0
        for branch in (part.query, part.key):
            groups = len(branch.rows) // part.key_heads
            gone = [
                int(branch.rows[head, feature])
                for head in range(len(branch.rows))
                for feature in range(16)
                if feature not in part.kept[width][head // groups].tolist()
            ]
            # The change of weight and bias as one matrix, its inputs with a one behind them.
            weight = program.weight(branch.weight).double()
            bias = program.weight(branch.bias).double() if branch.bias else torch.zeros(len(weight)).double()
            mean = part.mean
            longer = torch.cat((weight, bias[:, None]), 1)
            moments_of = torch.block_diag(inputs[branch.weight], torch.ones(1, 1, dtype=torch.float64))
            moments_of[-1, :-1] = moments_of[:-1, -1] = mean
            change = torch.zeros_like(longer)
            change[gone] = longer[gone]
            expected += float((gradients[branch.weight] @ change @ moments_of * change).sum()) / 4
        assert float(part.losses[width]) == pytest.approx(expected, rel=1e-9)


def test_size_alone_decides_where_gradients_are_not_asked_for():
    program = canonical("llama")
    choice, _ = choose_layers(program, "test", (), ())
    part = find_parts(program, choice, ("query-key",), "one-sided")[0]
    covariance = torch.eye(64, dtype=torch.float64)
    part.plan(program, dict.fromkeys(part.prices_need, covariance), None)
    assert part.losses is None
    queries, keys = (
        program.weight(branch.weight).view(-1, 16, 64).square().sum(-1) for branch in (part.query, part.key)
    )
    sizes = (queries.view(2, 2, 16).sum(1) * keys).sum(0)
    pairs = (sizes[:8] + sizes[8:]).argsort()
    gone = sorted([*pairs[:3].tolist(), *(pairs[:3] + 8).tolist()])
    assert sorted(set(range(16)) - set(part.kept[10][0].tolist())) == gone


def test_heads_without_rotary_choose_for_themselves():
    program = canonical("gpt2")
    _, changed = run(program, ReduceWidth(keep=0.95, parts=("query-key",), multiple_of=1))
    assert not [name for name, _ in changed.weights() if "rotary" in name]
    choice, _ = choose_layers(program, "test", (), ())
    part = find_parts(program, choice, ("query-key",), "one-sided")[0]
    part.plan(program, {part.query.weight: torch.eye(64, dtype=torch.float64)}, None)
    assert len({tuple(row) for row in part.kept[8].tolist()}) > 1
