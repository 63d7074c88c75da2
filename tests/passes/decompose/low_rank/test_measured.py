import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from skink.graph.passes import Context
from skink.passes.decompose.factorize.factorize import factorize
from skink.passes.decompose.low_rank.candidates import Candidate, Stack
from skink.passes.decompose.low_rank.measured import measured_losses
from skink.passes.decompose.selection import linear_layers
from tests.graph.programs import canonical
from tests.passes.decompose.programs import Block, captured, encoder, logits, text


def candidates(program, names):
    chosen = [layer for layer in linear_layers(program) if layer.name in names]
    return [Candidate(Stack((layer,)), factorize(program.weight(layer.weight))) for layer in chosen]


def padded():
    """Four texts of seven tokens and five of padding."""
    ids = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(2))
    return ids, (torch.arange(12) < 7).long().expand(4, 12)


def nats(program, ids):
    return float(cross_entropy(logits(program, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_the_rise_of_the_loss_with_one_weight_alone_factored():
    program, ids = canonical("llama").clone(), text(6)
    (entry,) = made = candidates(program, ["model.layers.0.mlp.up_proj"])
    before = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in program.weights()}
    (losses,) = measured_losses(program, made, 0.5, Context(calibration=ids))
    assert before == {name: (tensor.data_ptr(), tensor.shape) for name, tensor in program.weights()}
    assert len(losses) == entry.factors.rank + 1
    assert (losses.diff() <= 0).all()
    rank = round(0.5 * entry.factors.rank)
    changed = program.clone()
    up, down = entry.factors.at(rank)
    changed.set_weight(entry.stack.layers[0].weight, up @ down)
    rise = nats(changed, ids) - nats(program, ids)
    assert rise > 0
    assert float(losses[rank]) == pytest.approx(rise, rel=1e-3, abs=1e-6)


def test_without_logits_it_is_the_relative_distance_of_the_outputs():
    torch.manual_seed(1)
    block, x = Block(), torch.randn(12, 16)
    program = captured(block, 3, 16)
    made = candidates(program, ["first", "second"])
    losses = measured_losses(program, made, 0.5, Context(calibration=x))
    for entry, found in zip(made, losses, strict=True):
        rank = round(0.5 * entry.factors.rank)
        up, down = entry.factors.at(rank)
        changed = program.clone()
        changed.set_weight(entry.stack.layers[0].weight, up @ down)
        picked = x[torch.linspace(0, 11, 8).round().long()]
        exact, near = program(picked)[0].double(), changed(picked)[0].double()
        distance = float((near - exact).square().sum() / exact.square().sum())
        assert float(found[rank]) == pytest.approx(distance, rel=1e-4)
        # Between what was measured, the curve keeps the shape of the energy.
        assert float(found[-1]) < 1e-9 < float(found[rank])


def test_what_an_encoder_makes_of_padding_does_not_count():
    program = encoder(AutoModel, add_pooling_layer=False)
    made = candidates(program, ["encoder.layer.0.intermediate.dense"])
    ids, padding = padded()
    (one,) = measured_losses(program, made, 0.5, Context(calibration=ids * padding, padding=padding))
    (other,) = measured_losses(program, made, 0.5, Context(calibration=ids, padding=padding))
    assert torch.allclose(one, other, rtol=1e-4)


@pytest.mark.parametrize("kind", [AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_logits_of_no_next_token_are_compared_with_the_dense_ones(kind):
    program, (ids, padding) = encoder(kind), padded()
    (entry,) = made = candidates(program, ["bert.encoder.layer.0.intermediate.dense"])
    (losses,) = measured_losses(program, made, 0.5, Context(calibration=ids, padding=padding))
    rank = round(0.5 * entry.factors.rank)
    changed = program.clone()
    up, down = entry.factors.at(rank)
    changed.set_weight(entry.stack.layers[0].weight, up @ down)
    near, exact = (form(ids, padding, torch.zeros_like(ids))[0].log_softmax(-1) for form in (changed, program))
    divergence = kl_div(near, exact, reduction="none", log_target=True).sum(-1)
    if divergence.dim() == 2:
        divergence = divergence[padding.bool()]
    assert float(divergence.mean()) > 0
    assert float(losses[rank]) == pytest.approx(float(divergence.mean()), rel=0.02, abs=1e-7)


def test_a_weight_comes_back_though_the_run_fails(monkeypatch):
    program = canonical("llama").clone()
    made = candidates(program, ["model.layers.0.mlp.up_proj"])
    before = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in program.weights()}
    calls = []

    def fail(*arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return cross_entropy(*arguments, **options)

    monkeypatch.setattr("skink.passes.decompose.low_rank.measured.cross_entropy", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        measured_losses(program, made, 0.5, Context(calibration=text(2)))
    assert before == {name: (tensor.data_ptr(), tensor.shape) for name, tensor in program.weights()}
