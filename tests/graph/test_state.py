"""The step graph: its inputs and outputs, agreement with transformers, and graphs that cannot be stepped."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skink.errors import StateError
from skink.graph.capture import capture
from skink.graph.program import Program, Stage
from skink.graph.state import derive_step, without_padding
from tests.graph.stepping import empty_state, step_through
from tests.programs import batch, canonical, canonicalized, distance, eager, eager_logits


def test_chunks_equal_transformers(family: str) -> None:
    program = derive_step(canonical(family))
    inputs = batch(3, 14, padding=4)
    logits, _ = step_through(program, inputs, [6, 1, 1, 5, 1], empty_state(program, 3))
    assert distance(logits, eager_logits(family, inputs), inputs.attention_mask) < 1e-5


def test_state_equals_transformers_cache() -> None:
    program = derive_step(canonical("llama"))
    inputs = batch(2, 9)
    _, state = step_through(program, inputs, [4, 5], empty_state(program, 2))
    with torch.no_grad():
        cache = eager("llama")(**inputs._asdict(), use_cache=True).past_key_values
    for layer in range(2):
        torch.testing.assert_close(state[2 * layer], cache.layers[layer].keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state[2 * layer + 1], cache.layers[layer].values, rtol=1e-5, atol=1e-5)


def test_inputs_state_and_outputs_are_named() -> None:
    original = canonical("gemma2")
    text = str(original)
    program = derive_step(original)
    assert (str(original), original.stage) == (text, Stage.CANONICAL)
    assert program.stage is Stage.STEPPED
    assert [(entry.name, entry.dims) for entry in program.inputs] == [
        ("input_ids", ("B", "T")),
        ("attention_mask", ("B", "M")),
        ("position_ids", ("B", "T")),
    ]
    assert [(e.name, e.output_name, e.shape, e.growth, e.limit) for e in program.state] == [
        ("past_key_values.0.key", "present.0.key", ("B", 2, "P4", 16), "ring", 4),
        ("past_key_values.0.value", "present.0.value", ("B", 2, "P4", 16), "ring", 4),
        ("past_key_values.1.key", "present.1.key", ("B", 2, "P", 16), "append", 0),
        ("past_key_values.1.value", "present.1.value", ("B", 2, "P", 16), "append", 0),
    ]
    lines = str(program).splitlines()
    assert lines[0] == (
        "program stepped(%input_ids: i64[B,T], %attention_mask: i64[B,M], %position_ids: i64[B,T], "
        "%past_key_values_0_key: f32[B,2,P4,16], %past_key_values_0_value: f32[B,2,P4,16], "
        "%past_key_values_1_key: f32[B,2,P,16], %past_key_values_1_value: f32[B,2,P,16])"
    )
    assert lines[-1].startswith("  return logits=%")
    assert ", present.0.key=%slice_tensor" in lines[-1]
    assert "[%past_key_values_1_key, %rotary_default" in str(program)


def test_without_padding_no_op_reads_the_mask() -> None:
    program = canonical("gemma2")
    plain = without_padding(program)
    inputs = batch(2, 9)
    (mask,) = [node for node in plain.graph.find_nodes(op="placeholder") if node.target == "attention_mask"]
    assert not mask.users
    assert torch.equal(plain(*inputs)[0], program(*inputs)[0])
    padded = batch(2, 9, padding=3)
    assert distance(plain(*padded)[0], program(*padded)[0], padded.attention_mask) > 1e-3
    stepped = derive_step(plain)
    logits, _ = step_through(stepped, inputs, [3, 6], empty_state(stepped, 2))
    torch.testing.assert_close(logits, program(*inputs)[0], rtol=1e-5, atol=1e-5)


class Places(nn.Module):
    """Counts the tokens of a text itself, padding too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(97, 4), nn.Embedding(32, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]) + 2)
        heads = x[:, None]
        return torch.ops.skink.attention(heads, heads, heads, attention_mask.to(torch.bool), scale=0.5)[:, 0]


def test_counting_goes_on_from_the_past() -> None:
    inputs = batch(2, 9, padding=3)
    program, _ = canonicalized(Places(), inputs.input_ids, inputs.attention_mask)
    stepped = derive_step(program)
    state, parts = empty_state(stepped, 2), []
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        part = inputs.part(begin, end)
        result, *state = stepped(part.input_ids, part.attention_mask, *state)
        parts.append(result)
    whole = program(inputs.input_ids, inputs.attention_mask)[0]
    assert distance(torch.cat(parts, 1), whole, inputs.attention_mask) < 1e-6
    assert [edit.rule for edit in stepped.edits if edit.rule == "count-on"] == ["count-on"]


class Mixer(nn.Module):
    """One attention over what `heads` makes of the hidden states."""

    def __init__(self, heads: Any, **options: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.heads = heads
        self.options: dict[str, Any] = {"scale": 0.5, **options}

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        query, key, value = self.heads(self, x, attention_mask)
        seen = attention_mask.to(torch.bool)
        return torch.ops.skink.attention(query, key, value, seen, **self.options)


def mixer(heads: Any, **options: Any) -> Program:
    examples = (torch.randn(2, 1, 3, 4), torch.ones(2, 3, dtype=torch.int64))
    dims = {"x": {0: "B", 2: "T"}, "attention_mask": {0: "B", 1: "T"}}
    return capture(Mixer(heads, **options), examples, dims=dims)


def check_mixer(program: Program) -> None:
    x, mask = torch.randn(2, 1, 7, 4), torch.ones(2, 7, dtype=torch.int64)
    mask[0, :2] = 0
    stepped = derive_step(program)
    state, parts = empty_state(stepped, 2), []
    for begin, end in ((0, 3), (3, 4), (4, 7)):
        result, *state = stepped(x[:, :, begin:end], mask[:, :end], *state)
        parts.append(result)
    found, wanted = torch.cat(parts, 2), program(x, mask)[0]
    torch.testing.assert_close(found[1], wanted[1])
    torch.testing.assert_close(found[0, :, 2:], wanted[0, :, 2:])


@pytest.mark.parametrize(
    "heads",
    [
        lambda self, x, mask: (x, x, x),
        lambda self, x, mask: (x, self.layer(x), x),
        lambda self, x, mask: (self.layer(x), x, x),
        lambda self, x, mask: (self.layer(x), x, x + 1),
    ],
    ids=["all", "query-value", "key-value", "none"],
)
@pytest.mark.parametrize("window", [0, 1, 3])
def test_heads_may_be_one_tensor(heads: Any, window: int) -> None:
    check_mixer(mixer(heads, window=window))


def test_windows_of_many_sizes() -> None:
    class Many(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            for window in (1, 2, 3, 4, 5):
                x = torch.ops.skink.attention(x, x, x, attention_mask.to(torch.bool), scale=0.5, window=window)
            return x

    dims = {"x": {0: "B", 2: "T"}, "attention_mask": {0: "B", 1: "T"}}
    program = capture(Many(), (torch.randn(2, 1, 3, 4), torch.ones(2, 3, dtype=torch.int64)), dims=dims)
    check_mixer(program)
    assert [entry.limit for entry in derive_step(program).state] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def reads_mask(self: Any, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden = x * mask[:, None, :, None]
    return hidden, hidden, hidden


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        (reads_mask, {}, "attention_mask is read by aten.slice.Tensor|attention_mask is read by aten.unsqueeze"),
        (lambda self, x, mask: (x, x, x), {"causal": False}, "attention is not causal: tokens to come would change"),
    ],
)
def test_graphs_that_cannot_be_stepped_are_refused(heads: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(StateError, match=rf"\[STATE-001\] ({message})") as caught:
        derive_step(mixer(heads, **options))
    assert caught.value.where.startswith("%")
    assert "test_state.py:" in caught.value.where
    assert caught.value.fix


def test_padding_from_another_input_is_refused() -> None:
    class Guesses(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return torch.ops.skink.attention(x, x, x, x[:, 0, :, 0] != 0, scale=0.5)

    dims = {"x": {0: "B", 2: "T"}, "attention_mask": {0: "B", 1: "T"}}
    examples = (torch.randn(2, 1, 3, 4), torch.ones(2, 3, dtype=torch.int64))
    message = r"\[STATE-001\] attention takes its padding from %ne.*, which covers the new tokens only"
    with pytest.raises(StateError, match=message) as caught:
        derive_step(capture(Guesses(), examples, dims=dims))
    assert "test_state.py:" in caught.value.where
    assert "attention_mask" in caught.value.fix
