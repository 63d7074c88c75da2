import pickle
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from skink.errors import ModelError
from skink.export.huggingface.functions import (
    Functions,
    Variant,
    extend,
    state_in_place,
)
from skink.graph.capture import capture
from skink.graph.state import derive_step
from tests.export.huggingface.built import factored_program
from tests.programs import batch, canonical

aten = torch.ops.aten

FULL = Variant(
    step=False, padded=True, last_only=False, training=False, in_place=False, dtype=torch.float32, device="cpu"
)


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


def test_thin_layers_run_as_one_and_the_last_token_is_still_found() -> None:
    program, inputs = factored_program(), batch(2, 7)
    functions = Functions(program)
    tree = program.module()
    with torch.no_grad():
        expected = program(*inputs)[0]
        for last_only in (False, True):
            found = functions.get(replace(FULL, last_only=last_only))(tree, *inputs)[0]
            torch.testing.assert_close(found, expected[:, -1:] if last_only else expected, rtol=1e-4, atol=1e-5)


def test_functions_survive_pickling() -> None:
    program, inputs = canonical("llama"), batch(2, 5)
    functions = pickle.loads(pickle.dumps(Functions(program)))
    tree = program.module()
    with torch.no_grad():
        assert torch.allclose(functions.get(FULL)(tree, *inputs)[0], program(*inputs)[0], atol=1e-6)


def test_a_graph_that_takes_what_decoders_do_not_is_refused() -> None:
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    program = capture(BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=1)))
    with pytest.raises(ModelError, match=r"\[MODEL-005\] the graph takes token_type_ids, which this kind of model"):
        Functions(program)
