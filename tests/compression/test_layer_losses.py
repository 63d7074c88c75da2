"""What single layers add to the loss, measured."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from skink.compression import compress_program
from skink.compression.layer_losses import effective_weight, layer_losses
from skink.graph.program import Program
from skink.passes.decompose import LowRank
from skink.passes.decompose.selection import linear_layers
from tests.models import VOCABULARY
from tests.programs import canonical

TOKENS = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(3))


def score(program: Program) -> float:
    """Nats per token of a decoder's program."""
    logits = program(TOKENS, torch.ones_like(TOKENS), torch.arange(8).expand(2, -1))[0]
    return float(cross_entropy(logits[:, :-1].flatten(0, 1).double(), TOKENS[:, 1:].flatten()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("recipe", ["low-rank{keep=0.5,method=plain}", "tucker{rank=12,factors=3}"])
def test_the_matrix_is_the_product_of_its_factors(family: str, recipe: str) -> None:
    done = compress_program(canonical(family), recipe, verify=0)
    weights = dict(done.program.weights())
    seen = 0
    for layer in linear_layers(done.dense):
        found = effective_weight(done.dense, done.program, layer)
        names = [f"{layer.name}.{part}.weight" for part in ("up", "core", "down")]
        factors = [weights[name] for name in names if name in weights]
        if not factors:
            assert found is None
            continue
        seen += 1
        product = torch.linalg.multi_dot([factor.double() for factor in factors])
        assert found is not None
        torch.testing.assert_close(found.double(), product, rtol=1e-5, atol=1e-5)
    assert seen >= 8


@pytest.mark.parametrize(
    "recipe",
    [
        "basis-sharing{keep=0.6,allocation=uniform}",
        "low-rank{keep=0.6,allocation=uniform,share_inputs=true,refit=false}",
    ],
)
def test_layers_that_share_a_factor_have_each_its_own_matrix(recipe: str) -> None:
    done = compress_program(canonical("llama"), recipe, calibration=TOKENS, verify=0)
    layers = {layer.name: layer for layer in linear_layers(done.dense)}
    factored = [record for record in done.result.layers if record.decision == "factored"]
    # The first of those that share holds what is shared.
    owners = [name for name, _ in done.program.weights() if name.endswith((".down.weight", ".kept.weight"))]
    assert len(owners) < len(factored)
    for record in factored:
        layer = layers[record.name]
        found, weight = effective_weight(done.dense, done.program, layer), done.dense.weight(layer.weight)
        assert found is not None, record.name
        assert float((found - weight).norm() / weight.norm()) == pytest.approx(record.weight_error, rel=1e-3)


def test_each_layer_alone_against_the_model_with_that_weight() -> None:
    done = compress_program(canonical("llama"), "low-rank{keep=0.5,method=plain}", verify=0)
    steps: list[tuple[int, int]] = []
    losses = layer_losses(
        done.dense, done.program, done.result.layers, score, progress=lambda *step: steps.append(step)
    )
    factored = [record.name for record in done.result.layers if record.decision == "factored"]
    assert list(losses) == factored
    assert steps == [(step, len(factored) + 1) for step in range(1, len(factored) + 2)]
    name = "model.layers.1.mlp.up_proj"
    up, down = (done.program.weight(f"{name}.{part}.weight") for part in ("up", "down"))
    by_hand = done.dense.clone()
    by_hand.set_weight(f"{name}.weight", up @ down)
    assert losses[name] == pytest.approx(score(by_hand) - score(done.dense), rel=1e-4)
    assert losses[name] != 0
    # The dense program is as it was.
    assert score(done.dense) == pytest.approx(score(compress_program(canonical("llama"), verify=0).program), abs=1e-6)


def test_nothing_factored_is_not_measured() -> None:
    done = compress_program(canonical("llama"), [LowRank(method="plain", ignore=("*",))], verify=0)
    assert layer_losses(done.dense, done.program, done.result.layers, score) == {}


def test_what_has_another_shape_is_left_out() -> None:
    done = compress_program(canonical("llama"), "low-rank{keep=0.5,method=plain}", verify=0)
    layer = next(layer for layer in linear_layers(done.dense) if layer.name.endswith("q_proj"))
    up = done.program.weight(f"{layer.name}.up.weight")
    done.program.set_weight(f"{layer.name}.up.weight", up[:-1])
    assert effective_weight(done.dense, done.program, layer) is None


def test_what_depends_on_something_else_is_left_out() -> None:
    done = compress_program(canonical("llama"), "low-rank{keep=0.5,method=plain}", verify=0)
    layer = next(layer for layer in linear_layers(done.dense) if layer.name.endswith("q_proj"))
    layer.readers[0].args[0].name = "no_longer_there"
    assert effective_weight(done.dense, done.program, layer) is None
