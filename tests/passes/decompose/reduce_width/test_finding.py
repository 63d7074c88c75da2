import pytest
import torch

from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose.reduce_width.finding import find_parts, input_means
from skink.passes.decompose.reduce_width.reduce_width import KINDS
from skink.passes.decompose.selection import choose_layers
from tests.graph.programs import canonical
from tests.models import build, tiny
from tests.passes.decompose.reduce_width.test_reduce_width import ReduceWidth, run, text


def found(program, kinds=KINDS):
    choice, _ = choose_layers(program, "test", (), ())
    return find_parts(program, choice, kinds, "two-sided"), choice


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "opt"])
def test_every_layer_has_its_three_widths(family):
    parts, choice = found(canonical(family))
    assert [part.kind for part in parts].count("feed-forward") == 2
    assert [part.kind for part in parts].count("value-output") == 2
    assert [part.kind for part in parts].count("query-key") == 2
    assert {layer.weight for part in parts for layer in part.layers} == {layer.weight for layer in choice}
    assert {part.width for part in parts if part.kind != "feed-forward"} == {16}


def reasons(program, kinds=KINDS):
    result, _ = run(program, ReduceWidth(keep=1.0, parts=kinds))
    return {layer.name: layer.reason for layer in result.layers}, [refused.reason for refused in result.refused]


def test_queries_and_keys_with_norms_of_their_own_are_refused():
    by_name, refused = reasons(canonical("qwen3"))
    expected = "rms_norm stands between the projection and attention"
    for layer in ("q_proj", "k_proj"):
        assert by_name[f"model.layers.1.self_attn.{layer}"] == expected
    assert refused.count(expected) == 4
    kinds = [part.kind for part in found(canonical("qwen3"))[0]]
    assert sorted(set(kinds)) == ["feed-forward", "value-output"]


def test_experts_have_no_width_to_shrink():
    parts, _ = found(canonical("mixtral"))
    assert {part.kind for part in parts} == {"value-output", "query-key"}


def test_weights_that_several_layers_read_are_refused():
    model = build("llama")
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    model.model.layers[1].self_attn.v_proj.weight = model.model.layers[0].self_attn.v_proj.weight
    program = capture(model)
    Pipeline((Canonicalize(),)).run(program, verify=0)
    by_name, _ = reasons(program)
    assert by_name["model.layers.0.mlp.down_proj"] == "model.layers.0.mlp.down_proj.weight is read in several places"
    assert by_name["model.layers.1.mlp.up_proj"] == "model.layers.0.mlp.down_proj.weight is read in several places"
    assert (
        by_name["model.layers.0.self_attn.o_proj"] == "model.layers.0.self_attn.v_proj.weight is read in several places"
    )


def test_weights_that_are_not_finite_are_refused():
    program = canonical("llama").clone()
    name = "model.layers.0.mlp.up_proj.weight"
    broken = program.weight(name).clone()
    broken[3, 4] = torch.inf
    program.set_weight(name, broken)
    _, choice = found(program, ("feed-forward",))
    kept = {layer.weight for layer in choice}
    assert "model.layers.0.mlp.gate_proj.weight" not in kept
    assert "model.layers.1.mlp.gate_proj.weight" in kept


def test_means_of_inputs():
    model, program = tiny("gpt2"), canonical("gpt2")
    seen = []
    handle = model.transformer.h[1].attn.c_attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(text())
    handle.remove()
    name = "transformer.h.1.attn.c_attn.weight"
    means = input_means(program, [name], text(), None)
    torch.testing.assert_close(means[name], seen[0].double().mean((0, 1)), rtol=1e-4, atol=1e-6)
    # Padding does not count.
    padding = torch.ones_like(text())
    padding[:, 12:] = 0
    half = input_means(program, [name], text(), padding)
    torch.testing.assert_close(half[name], seen[0][:, :12].double().mean((0, 1)), rtol=1e-4, atol=1e-6)
    assert input_means(program, [], text(), None) == {}
