from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from skink.errors import RecoveryError
from skink.graph.calibration import token_batches
from skink.training.layerwise.group import Batch, LayerGroup
from skink.training.layerwise.layer import Half, Layer, hidden_targets, weights_for
from skink.training.layerwise.pieces import cut_pieces
from skink.training.loop.options import TrainOptions
from skink.training.weights.trainable import trainable_names
from tests.models import VOCABULARY
from tests.training.layerwise.factored import factored


def group(
    trains: tuple[bool, bool] = (True, True), damaged: str = "", **changed: Any
) -> tuple[LayerGroup, list[Batch]]:
    """Both layers of a llama, of whose original a weight may be damaged, and two batches that come to the first."""
    program, original = factored()
    if damaged:
        original = original.clone()
        original.set_weight(damaged, torch.full_like(original.weight(damaged), torch.nan))
    options = TrainOptions(**{"learning_rate": 1e-2, **changed})
    pieces = cut_pieces(original, program, trainable_names(program, original, "new"))
    frozen = weights_for(original, "float32")
    members = [
        Layer(original, program, piece, hidden_targets(piece), options.precision)
        if wanted
        else Half(original, piece.begin.teacher, piece.end.teacher, frozen)
        for piece, wanted in zip(pieces, trains, strict=True)
    ]
    tokens = torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))
    table = original.weight("model.embed_tokens.weight")
    batches = [
        Batch(inputs, [table[inputs["input_ids"]]], None, inputs["input_ids"].numel())
        for inputs in token_batches(original, tokens, batch=2)
    ]
    return LayerGroup(members, options, (2.0, 1.0)), batches


def test_a_step_reports_the_errors_that_were_measured() -> None:
    layers, batches = group()
    measured = layers.measure(batches)
    errors = layers.step(batches, 24, rate=0.0)
    assert [2 * error[0] for error in errors] == pytest.approx(measured, rel=1e-5)
    assert [error[1] for error in errors] == [0.0, 0.0]
    assert layers.measure(batches) == measured


def test_the_measure_stays_what_it_was_at_first() -> None:
    layers, batches = group()
    layers.measure(batches)
    one, two = (layers.measure([batch]) for batch in batches)
    other, _ = group()
    assert [(a + b) / 2 for a, b in zip(one, two, strict=True)] == pytest.approx(other.measure(batches), rel=1e-6)


def test_steps_lower_the_loss_and_free_gradients() -> None:
    layers, batches = group()
    before = layers.measure(batches)
    for _ in range(5):
        layers.step(batches, 24, rate=3e-3)
    assert all(after < loss for after, loss in zip(layers.measure(batches), before, strict=True))
    assert all(weight.grad is None for layer in layers.layers for weight in layer.weights.values())


def test_a_layer_that_does_not_train_hands_values_on() -> None:
    layers, batches = group((False, True))
    both, _ = group()
    assert layers.measure(batches) == both.measure(batches)[1:]
    assert layers.step(batches, 24, rate=0.0) == both_errors(both, batches)[1:]


def both_errors(layers: LayerGroup, batches: list[Batch]) -> list[list[float]]:
    return layers.step(batches, 24, rate=0.0)


def test_the_insides_of_one_layer_go_before_the_next_runs() -> None:
    layers, batches = group()
    layers.measure(batches)
    seen: list[bool] = []

    def watched() -> Iterator[Batch]:
        for batch in batches:
            yield batch
            # Behind each micro-batch every layer has had its way back.
            seen.append(all(weight.grad is not None for layer in layers.layers for weight in layer.weights.values()))

    layers.step(watched(), 24, rate=0.0)
    assert seen == [True, True]


def test_gradients_are_clipped_layer_by_layer() -> None:
    layers, batches = group(clip=1e-3)
    layers.measure(batches)
    layers.step(batches, 24, rate=1e-3)
    for layer, optimizer in zip(layers.layers, layers._optimizers, strict=True):
        moments = [optimizer.state[weight]["exp_avg"] for weight in layer.weights.values()]
        # (1 - beta1) times the gradient, after one step.
        assert float(torch.nn.utils.get_total_norm(moments)) == pytest.approx(0.1 * 1e-3, rel=1e-2)


def test_float16_leaves_out_a_step_that_overflows() -> None:
    layers, batches = group(precision="float16")
    layers.measure(batches)
    layers._scales[0].value = 2.0**60
    before = [[weight.clone() for weight in layer.weights.values()] for layer in layers.layers]
    layers.step(batches, 24, rate=1e-2)
    changed = [
        any(not torch.equal(one, two) for one, two in zip(known, layer.weights.values(), strict=True))
        for known, layer in zip(before, layers.layers, strict=True)
    ]
    assert changed == [False, True]
    assert layers._scales[0].value == 2.0**59


@pytest.mark.parametrize("what", ["error", "gradient"])
def test_what_is_not_finite_is_said(what: str) -> None:
    layers, batches = group()
    layers.measure(batches)
    layers.step(batches, 24, rate=1e-3)
    weight = next(iter(layers.layers[1].weights.values()))
    if what == "error":
        weight.data.fill_(torch.inf)
    else:
        weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(RecoveryError) as caught:
        layers.step(batches, 24, rate=1e-2)
    assert caught.value.code == "RECOVER-003"
    assert caught.value.what == f"training of model.layers.1 broke down at step 2: its {what} is not finite."
    assert caught.value.why == "the learning rate was 0.01."


@pytest.mark.parametrize("weight", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_damaged_teacher_is_to_blame(weight: str) -> None:
    layers, batches = group(damaged=weight)
    with pytest.raises(RecoveryError) as caught:
        layers.measure(batches)
    assert caught.value.what.endswith("cannot begin: its error is not finite.")
    assert caught.value.why == f"the teacher's weight {weight!r} was not finite before the first step."


def test_values_of_the_teacher_that_are_not_finite_are_to_blame() -> None:
    layers, batches = group()
    # Weights are finite, and what they are multiplied with is not.
    bad = [replace(batch, entry=[entry * torch.inf for entry in batch.entry]) for batch in batches]
    layers.measure(batches)
    with pytest.raises(RecoveryError) as caught:
        layers.step(bad, 24, rate=1e-2)
    assert caught.value.why == "the teacher gives values that are not finite for this text."
    other, _ = group()
    with pytest.raises(RecoveryError, match="the teacher gives values"):
        other.measure(bad)
