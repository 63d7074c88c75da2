"""Where the head begins, and logits of the last token only."""

import pytest
import torch

from skink.graph.last_token import head_input, last_token_only
from tests.programs import batch, canonical


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
