"""Text that a tiny model can learn, and pipelines that train on it."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from skink.graph.pipeline import Pipeline, PipelineResult
from skink.graph.program import Program
from skink.graph.windows import Windows
from skink.passes.recipe import parse_passes
from tests.models import VOCABULARY
from tests.programs import canonical


def progressions(count: int, length: int = 16, seed: int = 0) -> Tensor:
    """int64[count, length]: rows that go on by a step of 1 to 3, from any token."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, VOCABULARY, (count, 1), generator=generator)
    step = torch.randint(1, 4, (count, 1), generator=generator)
    return (first + step * torch.arange(length)) % VOCABULARY


TEXT = Windows(progressions(48), "progressions", "1" * 64)
HELD_OUT = Windows(progressions(4, seed=1), "other progressions", "2" * 64)
CUT = "low-rank{keep=0.5,method=plain}"


def run(
    recipe: str,
    *,
    program: Program | None = None,
    text: Windows | None = TEXT,
    held_out: Windows | None = None,
    original: Program | None = None,
    checkpoints: Path | None = None,
    seed: int = 0,
    status: Callable[[str], None] = lambda said: None,
) -> tuple[Program, PipelineResult]:
    """A tiny llama, and what a recipe did to it."""
    program = program or canonical("llama")
    result = Pipeline(parse_passes(recipe), start=program.stage).run(
        program,
        verify=1,
        seed=seed,
        training=text,
        held_out=held_out,
        original=original,
        checkpoints=checkpoints,
        status=status,
    )
    return program, result


def weights(program: Program) -> dict[str, Tensor]:
    """The weights by name, as they are now."""
    return dict(program.weights())
