"""The law of state: full sequence = any chunking = step by step, from a zero or a non-zero state, padded or not, past
the window's edge.
"""

from functools import cache

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from skink.graph.capture import capture
from skink.graph.program import Program
from skink.graph.state import derive_step
from tests.graph.stepping import empty_state, step_through
from tests.programs import Batch, batch, canonical


class Decoder(nn.Module):
    """A decoder of one token-mixing op for each window, with more query heads than key heads."""

    def __init__(self, windows: tuple[int, ...], softcap: float, sinks: bool) -> None:
        super().__init__()
        self.windows, self.softcap = windows, softcap
        self.embed = nn.Embedding(97, 8)
        self.place = nn.Embedding(32, 8)
        self.mixed = nn.ModuleList([nn.Linear(8, 16) for _ in windows])
        self.sinks = nn.Parameter(torch.randn(4)) if sinks else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids) + self.place(position_ids)
        for window, layer in zip(self.windows, self.mixed, strict=True):
            query, key, value = layer(hidden).unflatten(-1, (8, 2)).transpose(1, 2).split([4, 2, 2], 1)
            mixed = torch.ops.skink.attention(
                query,
                key,
                value,
                attention_mask.bool(),
                scale=1.0,
                window=window,
                softcap=self.softcap,
                sinks=self.sinks,
            )
            hidden = hidden + mixed.transpose(1, 2).flatten(2)
        return hidden


@cache
def decoder(windows: tuple[int, ...], softcap: float, sinks: bool) -> tuple[Program, Program]:
    torch.manual_seed(0)
    example = batch(2, 3)
    full = capture(Decoder(windows, softcap, sinks), example)
    return full, derive_step(full)


@cache
def gemma() -> tuple[Program, Program]:
    full = canonical("gemma2")
    return full, derive_step(full)


@st.composite
def chunked(draw: st.DrawFn) -> tuple[Batch, list[int]]:
    """Inputs, and a way to cut them into chunks."""
    inputs = batch(draw(st.integers(1, 3)), draw(st.integers(1, 24)), padding=draw(st.integers(0, 6)))
    length = inputs.input_ids.shape[1]
    cuts = sorted(draw(st.sets(st.integers(1, length - 1)))) if length > 1 else []
    if draw(st.booleans()):
        cuts = list(range(1, length))
    return inputs, [end - begin for begin, end in zip([0, *cuts], [*cuts, length], strict=True)]


def assert_law(full: Program, stepped: Program, inputs: Batch, chunks: list[int]) -> None:
    wanted = full(*inputs)[0]
    found, state = step_through(stepped, inputs, chunks, empty_state(stepped, len(inputs.input_ids)))
    real = inputs.attention_mask.bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=2e-5)
    # And on from there: the state after these tokens serves whatever follows.
    after = batch(len(inputs.input_ids), 5)
    mask = torch.cat([inputs.attention_mask, after.attention_mask], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    both = Batch(torch.cat([inputs.input_ids, after.input_ids], 1), mask, positions)
    length = inputs.input_ids.shape[1]
    continued = stepped(after.input_ids, mask, positions[:, length:], *state)[0]
    torch.testing.assert_close(continued, full(*both)[0][:, length:], rtol=1e-4, atol=2e-5)


@given(
    chunked(),
    st.sampled_from([((0, 1), 0.0, False), ((2, 5), 0.0, False), ((1, 2), 2.0, True), ((40, 5), 0.0, True)]),
)
def test_attention_of_every_kind(parts: tuple[Batch, list[int]], kind: tuple[tuple[int, ...], float, bool]) -> None:
    assert_law(*decoder(*kind), *parts)


@given(chunked())
def test_a_decoder_with_windows_and_without(parts: tuple[Batch, list[int]]) -> None:
    assert_law(*gemma(), *parts)
