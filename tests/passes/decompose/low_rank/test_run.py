"""What the pass does with the method that is its default, and with the others at each allocation."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from skink.errors import BudgetError
from skink.graph.gradients import stream_moments
from skink.passes.decompose import LowRank
from skink.passes.decompose.selection import linear_layers, structural_reason
from tests.graph.programs import canonical
from tests.passes.decompose.programs import Block, captured, encoder, logits, run, text


def kept(program, changed):
    """The share of numbers that the layers keep that the pass may touch."""
    before = sum(
        layer.parameters
        for layer in linear_layers(program)
        if structural_reason(layer, frozenset(), asked=True) is None and "lm_head" not in layer.name
    )
    gone = sum(tensor.numel() for _, tensor in program.weights()) - sum(
        tensor.numel() for name, tensor in changed.weights() if tensor.is_floating_point() and "bias" not in name
    )
    biases = sum(tensor.numel() for name, tensor in changed.weights() if "bias" in name)
    return 1 - (gone - biases) / before


@pytest.mark.parametrize("form", ["thin", "pivoted"])
@pytest.mark.parametrize("keep", [0.9, 0.6])
def test_the_budget_is_met(form, keep):
    program = canonical("llama")
    result, changed = run(program, LowRank(keep=keep, form=form, refit=False), calibration=text())
    share = kept(program, changed)
    assert keep - 0.01 < share <= keep + 1e-9
    (note,) = [note for note in result.notes if note.startswith("kept of 14 linear layers")]
    assert f"{share:.4f} of the parameters" in note
    before = sum(record.parameters_before for record in result.layers if record.name != "lm_head")
    after = sum(record.parameters_after for record in result.layers if record.name != "lm_head")
    assert after / before == pytest.approx(share)


@pytest.mark.parametrize("form", ["thin", "pivoted"])
@pytest.mark.parametrize("share", [False, True])
def test_the_predicted_loss_is_that_of_the_factors(form, share):
    """1/2 tr(G D C D^T) / tokens^2 of every layer, from the moments and the weights that were written."""
    program, ids = canonical("llama"), text()
    options = LowRank(keep=0.7, form=form, share_inputs=share, refit=False)
    result, changed = run(program, options, calibration=ids)
    names = [f"{record.name}.weight" for record in result.layers if record.name != "lm_head"]
    moments = {name: found for some in stream_moments(program, ids, names) for name, found in some.items()}
    total = 0.0
    records = {record.name: record for record in result.layers}
    for name in names:
        record = records[name.removesuffix(".weight")]
        if record.decision != "factored":
            assert record.predicted_loss is None
            continue
        total += record.predicted_loss
        if form == "thin" and f"{record.name}.down.weight" in dict(changed.weights()) and not share:
            product = (
                changed.weight(f"{record.name}.up.weight").double()
                @ changed.weight(f"{record.name}.down.weight").double()
            )
            error = program.weight(name).double() - product
            both = moments[name]
            loss = 0.5 * torch.trace(both.gradients.total @ error @ both.inputs.total @ error.T)
            tokens = both.gradients.tokens * both.inputs.tokens
            assert record.predicted_loss == pytest.approx(float(loss) / tokens, rel=1e-3, abs=1e-9)
    (note,) = [note for note in result.notes if "predicted rise" in note]
    assert f"predicted rise of the loss: {total:.4g} nats per token" in note


def test_one_threshold_loses_less_than_one_share_and_sharing_and_pivots_less_still():
    program, ids = canonical("llama"), text(16)

    def predicted(**options):
        result, _ = run(program, LowRank(keep=0.6, refit=False, **options), calibration=ids)
        return sum(record.predicted_loss or 0.0 for record in result.layers)

    uniform = predicted(allocation="uniform", form="thin")
    apart = predicted(form="thin", share_inputs=False)
    assert apart < 0.9 * uniform
    assert predicted(form="thin", share_inputs=True) <= apart * 1.001
    assert predicted(form="pivoted", share_inputs=False) < 0.9 * apart


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "opt", "qwen3"])
@pytest.mark.parametrize("form", ["thin", "pivoted"])
def test_every_family_at_nearly_full_rank_is_nearly_the_same(family, form):
    """GQA, fused qkv, Conv1D, biases, tied heads: what is computed is what the factors say."""
    program, ids = canonical(family), text()
    # Weights of half the rank, so that their factors are exact.
    halved = program.clone()
    for layer in linear_layers(halved):
        if layer.others or "lm_head" in layer.name or "embed_out" in layer.name:
            continue
        u, s, v = torch.linalg.svd(halved.weight(layer.weight).double(), full_matrices=False)
        few = max(1, min(layer.shape) // 4)
        halved.set_weight(layer.weight, ((u[:, :few] * s[:few]) @ v[:few]).float())
    result, changed = run(halved, LowRank(keep=0.8, form=form), calibration=ids)
    assert sum(record.decision == "factored" for record in result.layers) > 3
    exact, near = logits(halved, ids), logits(changed, ids)
    assert float((near - exact).norm() / exact.norm()) < 2e-3


def test_layers_on_one_input_share_a_factor():
    options = LowRank(keep=0.4, form="thin", allocation="uniform", share_inputs=True, refit=False)
    _, changed = run(canonical("llama"), options, calibration=text())
    names = dict(changed.weights())
    assert "model.layers.0.self_attn.q_proj.down.weight" in names
    assert "model.layers.0.self_attn.k_proj.down.weight" not in names
    assert (
        names["model.layers.0.self_attn.k_proj.up.weight"].shape[1]
        == names["model.layers.0.self_attn.q_proj.down.weight"].shape[0]
    )
    assert "model.layers.0.self_attn.o_proj.down.weight" in names


@pytest.mark.parametrize("form", ["thin", "pivoted"])
def test_what_is_factored_stays_so(form):
    options = LowRank(keep=0.6, form=form, ignore=("lm_head",))
    _, once = run(canonical("llama"), options, calibration=text())
    result, _ = run(once, options, calibration=text())
    parts = [record for record in result.layers if record.reason == "it is already one of two thin factors"]
    assert len(parts) >= 12
    assert not any(record.decision == "factored" for record in result.layers if "kept" in record.name)


@pytest.mark.parametrize(
    ("method", "allocation"),
    [
        ("plain", "uniform"),
        ("asvd", "uniform"),
        ("fisher", "uniform"),
        ("two-sided", "uniform"),
        ("whitened", "measured"),
        ("plain", "measured"),
    ],
)
def test_other_methods_and_allocations(method, allocation):
    program, ids = canonical("llama"), text()
    result, changed = run(program, LowRank(keep=0.6, method=method, allocation=allocation), calibration=ids)
    factored = [record for record in result.layers if record.decision == "factored"]
    assert len(factored) >= 7
    assert kept(program, changed) <= 0.6 + 1e-9
    knows_outputs, knows_loss = method != "plain", method in ("fisher", "two-sided")
    assert all((record.predicted_error is not None) == knows_outputs for record in factored)
    assert all((record.baseline_error is not None) == knows_outputs for record in factored)
    assert all((record.predicted_loss is not None) == knows_loss for record in factored)
    assert torch.isfinite(logits(changed, ids)).all()


@pytest.mark.parametrize("budget", ["bytes", "flops"])
def test_other_budgets(budget):
    result, _ = run(canonical("llama"), LowRank(keep=0.7, budget=budget, refit=False), calibration=text())
    (note,) = [note for note in result.notes if note.startswith("kept of")]
    parts = [part.split(" of the ") for part in note.split(";")[0].rstrip(".").split(", ")]
    shares = {name: float(share.split()[-1]) for share, name in parts}
    named = {"bytes": "bytes", "flops": "multiply-accumulates"}[budget]
    assert 0.69 < shares[named] <= 0.7


def test_a_budget_that_cannot_be_met():
    layers = nn.Linear(16, 1), nn.ReLU(), nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 16)
    program = captured(nn.Sequential(*layers), 3, 16)
    with pytest.raises(BudgetError) as caught:
        run(program, LowRank(keep=0.05, method="plain"))
    assert caught.value.code == "BUDGET-001"


def test_padding_does_not_count():
    program, ids = canonical("llama"), text(4)
    padded = torch.cat([ids, torch.zeros(4, 8, dtype=torch.int64)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(4, 8, dtype=torch.int64)], 1)
    options = LowRank(keep=0.6, method="whitened")
    _, one = run(program, options, calibration=ids)
    _, other = run(program, options, calibration=padded, padding=mask)
    for name, tensor in one.weights():
        torch.testing.assert_close(other.weight(name), tensor, rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_factors():
    (_, one), (_, other) = (run(canonical("llama"), LowRank(keep=0.6), calibration=text()) for _ in range(2))
    assert all(torch.equal(tensor, other.weight(name)) for name, tensor in one.weights())


def test_an_encoder_block():
    result, changed = run(captured(Block(), 3, 16), LowRank(keep=0.7), calibration=torch.randn(80, 16))
    assert {record.decision for record in result.layers} <= {"factored", "kept dense"}
    assert any(record.predicted_loss for record in result.layers)
    assert "first.order" in dict(changed.weights()) or "second.order" in dict(changed.weights())


@pytest.mark.parametrize("method", ["two-sided", "whitened"])
def test_what_reads_a_row_of_each_text_needs_as_many_texts_as_inputs(method):
    program = encoder(AutoModelForSequenceClassification)
    texts = torch.randint(1, 64, (40, 6), generator=torch.Generator().manual_seed(2))

    def pooler(count, options):
        result, _ = run(program, options, calibration=texts[:count])
        return next(layer for layer in result.layers if layer.name.endswith("pooler.dense"))

    left = pooler(31, LowRank(keep=0.5, method=method, ignore=("classifier",)))
    assert (left.decision, left.reason) == ("kept dense", "too little text: 31 rows, by text, for 32 inputs")
    assert pooler(32, LowRank(keep=0.5, method=method, allocation="uniform")).decision == "factored"
    assert pooler(31, LowRank(keep=0.5, method="plain")).decision == "factored"
