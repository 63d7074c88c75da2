"""Factored tiny models, made once per process, and what tests match their layers with."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from skink.graph.program import Program
from skink.graph.windows import Windows
from skink.training.layerwise.match_layers import match_layers
from skink.training.layerwise.record import MatchingRecord
from skink.training.loop.options import TrainOptions
from skink.training.losses.objectives import Terms
from tests.models import VOCABULARY
from tests.training import students

HIDDEN = Terms(hidden=1.0)
BOTH = Terms(hidden=1.0, attention=0.5)


@cache
def _factored(family: str) -> tuple[Program, Program]:
    return students.factored(family)


def factored(family: str = "llama") -> tuple[Program, Program]:
    """A factored model, to be changed at will, and its original."""
    program, original = _factored(family)
    return program.clone(), original


def text(windows: int = 10, length: int = 8, *, padded: bool = False) -> Windows:
    """Random tokens; half of every other window may be padding."""
    generator = torch.Generator().manual_seed(windows)
    tokens = torch.randint(3, VOCABULARY, (windows, length), generator=generator)
    padding = None
    if padded:
        padding = torch.ones_like(tokens)
        padding[::2, : length // 2] = 0
    return Windows(tokens, padding=padding)


def options(**changed: Any) -> TrainOptions:
    """A few steps at a rate at which they help."""
    return TrainOptions(**{"steps": 6, "batch": 4, "micro_batch": 2, "learning_rate": 3e-3, **changed})


def match(
    family: str = "llama", terms: Terms = HIDDEN, windows: Windows | None = None, **given: Any
) -> tuple[MatchingRecord, Program]:
    """Match a factored model with its original."""
    program, original = factored(family)
    changed = given.pop("options", options())
    return match_layers(original, program, windows or text(), changed, terms=terms, **given), program


def weights(program: Program) -> dict[str, Tensor]:
    """By name."""
    return {name: tensor.detach() for name, tensor in program.weights()}


def same(one: Program, other: Program) -> bool:
    """Whether all weights are, bit for bit."""
    return all(torch.equal(tensor, other.weight(name)) for name, tensor in one.weights())
