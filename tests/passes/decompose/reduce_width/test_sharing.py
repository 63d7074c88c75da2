from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from skink.budget import Workload, pricing
from skink.errors import BudgetError
from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose.reduce_width.finding import find_parts
from skink.passes.decompose.reduce_width.reduce_width import KINDS
from skink.passes.decompose.reduce_width.sharing import (
    block_influence,
    budget_for,
    by_loss,
    by_share,
    width_costs,
    widths_on_offer,
)
from skink.passes.decompose.selection import choose_layers
from tests.graph.programs import canonical
from tests.models import VOCABULARY, tiny
from tests.passes.decompose.reduce_width.test_reduce_width import text

COUNT = pricing("params", canonical("llama"))


def part(width, rows=10, losses=None, name="a"):
    """A part of one matrix [rows, width]."""
    return SimpleNamespace(
        name=name,
        kind="feed-forward",
        width=width,
        losses=losses,
        shapes=lambda at: [("w", rows, at)],
        can_have=lambda at: 0 < at <= width,
    )


def test_what_is_on_offer():
    assert widths_on_offer(part(20), multiple=8, floor=0.0).tolist() == [8, 16, 20]
    assert widths_on_offer(part(20), multiple=3, floor=0.5).tolist() == [12, 15, 18, 20]
    assert widths_on_offer(part(20), multiple=32, floor=0.0).tolist() == [20]
    losses = torch.tensor([9.0, 1.0, torch.inf, 0.5, 0.0])
    assert widths_on_offer(part(4, losses=losses), multiple=1, floor=0.0).tolist() == [1, 3, 4]


def test_costs_of_counts_are_exact():
    widths = torch.tensor([1, 7, 100, 333, 704])
    assert width_costs(part(704), COUNT, widths).tolist() == [10.0 * width for width in widths.tolist()]
    assert width_costs(part(1), COUNT, torch.tensor([1])).tolist() == [10.0]


def test_latency_is_measured_at_few_widths():
    asked = []

    def seconds(rows, out, in_, rank, dtype, device):
        asked.append(in_)
        return 1.0 + in_ * rows

    prices = pricing("latency", canonical("llama"), Workload(1, 1, 0), seconds=seconds)
    widths = torch.arange(1, 705)
    found = width_costs(part(704), prices, widths)
    torch.testing.assert_close(found, 1.0 + widths.double())
    assert len(set(asked)) <= 9


@pytest.mark.parametrize("kinds", [KINDS, ("feed-forward",), ("query-key",)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_budget_counts_what_no_part_covers(family, kinds):
    program = canonical(family)
    choice, _ = choose_layers(program, "test", (), ())
    counted = list(choice)
    parts = find_parts(program, choice, kinds, "two-sided")
    whole = sum(layer.parameters for layer in counted)
    own = sum(out * in_ for part in parts for _, out, in_ in part.shapes(part.width))
    assert budget_for(parts, counted, COUNT, 0.75) == (pytest.approx(0.75 * whole), whole - own)
    assert (own == whole) == (kinds == KINDS)


def test_by_loss_takes_where_it_costs_least():
    flat, steep = (torch.linspace(height, 0, 11).double() for height in (1.0, 5.0))
    parts = [part(10, losses=flat), part(10, losses=steep, name="b")]
    offers = [widths_on_offer(entry, multiple=1, floor=0.2) for entry in parts]
    assert by_loss(parts, offers, COUNT, budget=150.0) == [5, 10]
    assert by_loss(parts, offers, COUNT, budget=110.0) == [2, 9]
    assert by_loss(parts, offers, COUNT, budget=150.0, fixed=40.0) == [2, 9]
    with pytest.raises(BudgetError, match=r"BUDGET-001\].* 40 is the least, of 200 as it is"):
        by_loss(parts, offers, COUNT, budget=39.0)


def test_by_share_takes_alike_from_equals_and_less_from_what_matters():
    parts = [part(100), part(50, name="b")]
    offers = [widths_on_offer(entry, multiple=1, floor=0.0) for entry in parts]
    assert by_share(parts, offers, COUNT, 1500.0, [0.0, 0.0]) == [100, 50]
    assert by_share(parts, offers, COUNT, 1200.0, [0.3, 0.3]) == [80, 40]
    # MoDeGPT's equation 10: what goes is in proportion to softmax(-importance).
    shares = torch.softmax(-torch.tensor([0.0, 1.0], dtype=torch.float64), 0)
    found = by_share(parts, offers, COUNT, 1200.0, [0.0, 1.0])
    gone = [1 - found[0] / 100, 1 - found[1] / 50]
    assert gone[1] / gone[0] == pytest.approx(float(shares[1] / shares[0]), rel=0.1)
    assert 1180 <= 10 * sum(found) <= 1200
    assert by_share(parts, offers, COUNT, 1300.0, [0.3, 0.3], fixed=100.0) == [80, 40]
    with pytest.raises(BudgetError, match=r"BUDGET-001\].* 20 is the least, of 1500 as it is"):
        by_share(parts, offers, COUNT, 10.0, [0.0, 0.0])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_block_influence_is_one_minus_the_cosine_of_a_layers_ends(family):
    program, model = canonical(family), tiny(family)
    choice, _ = choose_layers(program, "test", (), ())
    parts = find_parts(program, choice, KINDS, "two-sided")
    states = []
    layers = model.model.layers if family == "llama" else model.gpt_neox.layers
    handles = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in layers]
    norm = model.model.norm if family == "llama" else model.gpt_neox.final_layer_norm
    handles.append(norm.register_forward_pre_hook(lambda _, args: states.append(args[0])))
    with torch.no_grad():
        model(text())
    for handle in handles:
        handle.remove()
    cosines = [torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(states)]
    found = block_influence(program, parts, text(), None)
    expected = [1 - float(cosines[int(".1." in part.lead.name)]) for part in parts]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification, AutoModelForQuestionAnswering])
def test_block_influence_of_an_encoder(kind):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = kind.from_config(AutoConfig.for_model("bert", **sizes, num_attention_heads=2)).eval()
    program = capture(model)
    Pipeline((Canonicalize(),)).run(program, verify=0)
    choice, _ = choose_layers(program, "test", (), ("*pooler*",))
    parts = find_parts(program, choice, KINDS, "two-sided")
    ids = text(4, 10)
    padding = (torch.arange(10) < 6).long().expand(4, 10)
    found = block_influence(program, parts, ids, padding)
    # What stands at padding counts for nothing, and each layer has a number of its own.
    assert found == pytest.approx(block_influence(program, parts, ids * padding, padding), rel=1e-4)
    assert len({round(influence, 9) for influence in found}) == 2
