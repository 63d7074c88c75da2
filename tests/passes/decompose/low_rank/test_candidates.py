import pytest
import torch

from skink.graph.gradients import stream_moments
from skink.graph.passes import Context
from skink.passes.decompose.factorize.factorize import factorize
from skink.passes.decompose.low_rank.candidates import Recipe, Stack, candidate, groups, stream_metrics
from skink.passes.decompose.selection import linear_layers
from tests.graph.programs import canonical
from tests.passes.decompose.programs import text


def recipe(method, **options):
    settings = {"left_damping": 1e-8, "right_damping": 1e-8, "alpha": 0.5, "labels": "sampled", "samples": 1}
    return Recipe(method, **(settings | {"baseline": False} | options))


def known(program, layers, method):
    names = [layer.weight for layer in layers]
    streamed = stream_metrics(program, names, recipe(method), Context(calibration=text()), lambda done, total: None)
    found = {name: entry for some in streamed for name, entry in some.items()}
    return [found[name] for name in names]


def layers_of(program, *names):
    return tuple(layer for layer in linear_layers(program) if layer.name.removeprefix("model.layers.0.") in names)


def test_groups_are_of_layers_that_read_one_input():
    layers = linear_layers(canonical("llama"))[:7]
    named = [[layer.name.split(".")[-1] for layer in group] for group in groups(layers, share=True)]
    assert named == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert groups(layers, share=False) == [(layer,) for layer in layers]


def test_a_stack_is_its_layers_one_above_the_other():
    program = canonical("llama")
    stack = Stack(layers_of(program, "self_attn.q_proj", "self_attn.k_proj"))
    assert (stack.shape, stack.uses) == ((96, 64), 1)
    weight = stack.weight(program)
    for layer, rows in zip(stack.layers, stack.split(weight), strict=True):
        assert torch.equal(rows, program.weight(layer.weight))


@pytest.mark.parametrize("method", ["two-sided", "whitened", "asvd", "fisher", "plain"])
def test_each_method_is_a_choice_of_metrics(method):
    program = canonical("llama")
    layers = layers_of(program, "mlp.up_proj")
    weight = program.weight(layers[0].weight).double()
    moments = next(
        some[layers[0].weight]
        for some in stream_moments(program, text(), [layers[0].weight], row_fisher=True)
        if layers[0].weight in some
    )
    c, g = moments.inputs.total, moments.gradients.total
    sizes = moments.inputs.absolute / moments.inputs.tokens
    left, right = {
        "two-sided": (g, c),
        "whitened": (None, c),
        "asvd": (None, sizes),
        "fisher": (moments.row_fisher, None),
        "plain": (None, None),
    }[method]
    expected = factorize(weight, left=left, right=right, rank=9)
    found = candidate(program, Stack(layers), known(program, layers, method), recipe(method), 9)
    product = found.factors.up.double() @ found.factors.down.double()
    exact = expected.up @ expected.down
    assert float((product - exact).norm() / exact.norm()) < 1e-4
    error = weight - product
    if method == "plain":
        assert found.output is None
        return
    output = torch.trace(error @ c @ error.T)
    assert float(found.output[9]) == pytest.approx(float(output), rel=1e-3)
    assert found.tokens == text().numel()
    if method in ("two-sided", "fisher"):
        loss = 0.5 * torch.trace(g @ error @ c @ error.T) / found.tokens**2
        assert float(found.losses[9]) == pytest.approx(float(loss), rel=1e-3)
        assert found.layer_losses == (found.losses,)
    else:
        assert found.losses is None


@pytest.mark.parametrize("method", ["two-sided", "fisher"])
def test_what_each_layer_of_a_stack_loses(method):
    program = canonical("llama")
    layers = layers_of(program, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    stack, entries = Stack(layers), known(program, layers, method)
    found = candidate(program, stack, entries, recipe(method), 12)
    torch.testing.assert_close(sum(found.layer_losses), found.losses)
    if method == "two-sided":
        for layer, up, losses, (inputs, both) in zip(
            layers, stack.split(found.factors.up), found.layer_losses, entries, strict=True
        ):
            error = program.weight(layer.weight).double() - up.double() @ found.factors.down.double()
            loss = 0.5 * torch.trace(both.gradients.total @ error @ inputs.total @ error.T) / inputs.tokens**2
            assert float(losses[12]) == pytest.approx(float(loss), rel=1e-3)


def test_the_baseline_is_the_plain_truncation():
    program = canonical("llama")
    layers = layers_of(program, "mlp.up_proj")
    entries = known(program, layers, "whitened")
    found = candidate(program, Stack(layers), entries, recipe("whitened", baseline=True), 9)
    weight = program.weight(layers[0].weight).double()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    error = weight - u[:, :9] @ torch.diag(s[:9]) @ v[:9]
    assert float(found.baseline[9]) == pytest.approx(
        float(torch.trace(error @ entries[0][0].total @ error.T)), rel=1e-6
    )
    assert float(found.output[9]) < float(found.baseline[9])
