"""Running a stepped program chunk by chunk."""

from collections.abc import Sequence

import torch
from torch import Tensor

from skink.graph.program import Program
from tests.programs import Batch


def empty_state(program: Program, batch: int) -> list[Tensor]:
    """The state before the first token."""
    sizes = {"B": batch}
    return [
        torch.zeros([sizes.get(dim, 0) if isinstance(dim, str) else dim for dim in entry.shape])
        for entry in program.state
    ]


def step_through(
    program: Program, inputs: Batch, chunks: Sequence[int], state: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The results of all chunks joined, and the state after the last."""
    parts: list[Tensor] = []
    begin = 0
    for length in chunks:
        result, *state = program(*inputs.part(begin, begin + length), *state)
        assert len(state) == len(program.state)
        for entry, tensor in zip(program.state, state, strict=True):
            kept = tensor.shape[entry.axis]
            assert kept == begin + length if entry.growth == "append" else kept <= entry.limit
        parts.append(result)
        begin += length
    return torch.cat(parts, 1), state
