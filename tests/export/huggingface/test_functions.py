import pickle
from dataclasses import replace

import pytest
import torch

from skink.export.huggingface.functions import (
    Functions,
    Variant,
    extend,
    head_input,
    last_token_only,
    state_in_place,
    without_weights,
)
from skink.graph.state import derive_step
from tests.programs import batch, canonical

aten = torch.ops.aten

FULL = Variant(
    step=False, padded=True, last_only=False, training=False, in_place=False, dtype=torch.float32, device="cpu"
)


@pytest.mark.parametrize(
    ("family", "after"),
    [
        # Everything from the last residual on: final norm, head, and Gemma's cap on the logits.
        ("llama", ["rms_norm", "linear"]),
        ("gemma2", ["rms_norm", "linear", "div", "tanh", "mul"]),
        ("gpt2", ["layer_norm", "linear"]),
    ],
)
def test_the_head_begins_after_the_last_layer(family: str, after: list[str]) -> None:
    program = canonical(family)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    cut = head_input(program)
    found = [str(node.target).split(".")[1] for node in nodes[nodes.index(cut) + 1 :]]
    assert found == after
    assert str(cut.target).startswith("aten.add")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_last_token_only_computes_one_token_after_the_cut(family: str) -> None:
    program, inputs = canonical(family), batch(2, 7, padding=2)
    short = last_token_only(program, head_input(program))
    assert torch.allclose(short(*inputs)[0], program(*inputs)[0][:, -1:], atol=1e-6)
    # The program that it was made from is as it was.
    assert program(*inputs)[0].shape[1] == 7


def test_state_in_place_extends_buffers_and_returns_logits_alone() -> None:
    step = derive_step(canonical("gemma2"))
    changed = state_in_place(step)
    targets = [node.target for node in changed.graph.nodes]
    assert targets.count(extend) == len(step.state) == 4
    assert not [node for node in changed.graph.nodes if node.target is aten.cat.default and node.args[1] == 2]
    assert len(changed.graph.output_node().args[0]) == 1
    assert len(step.graph.output_node().args[0]) == 5


def test_functions_are_made_once_for_each_variant() -> None:
    functions = Functions(canonical("llama"))
    first = functions.get(FULL)
    assert functions.get(replace(FULL)) is first
    assert functions.get(replace(FULL, padded=False)) is not first
    assert functions.get(replace(FULL, dtype=torch.bfloat16)) is not first


def test_functions_survive_pickling() -> None:
    program, inputs = canonical("llama"), batch(2, 5)
    functions = pickle.loads(pickle.dumps(Functions(program)))
    tree = program.module()
    with torch.no_grad():
        assert torch.allclose(functions.get(FULL)(tree, *inputs)[0], program(*inputs)[0], atol=1e-6)


def test_without_weights_casts_trained_weights_and_keeps_buffers() -> None:
    program = canonical("llama")
    empty = without_weights(program, torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in empty.weights()}
    assert dtypes["model.norm.weight"] == torch.bfloat16
    assert dtypes["model.rotary_emb.inv_freq"] == torch.float32
    assert all(tensor.is_meta for _, tensor in empty.weights())
    assert not program.is_meta
