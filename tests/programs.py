"""Programs that tests begin with, captured once per process; whoever edits one gets a copy from here."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from skink.graph.capture import Dims, capture
from skink.graph.passes import PassResult
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.passes.canonicalize import Canonicalize
from tests.models import VOCABULARY, build, tiny


class Batch(NamedTuple):
    """Inputs of a decoder, in the order of its program's inputs."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor

    def part(self, begin: int, end: int) -> "Batch":
        """The new tokens from `begin` to `end`, as a stepped program takes them: the mask covers the past too."""
        return Batch(self.input_ids[:, begin:end], self.attention_mask[:, :end], self.position_ids[:, begin:end])


def batch(size: int, length: int, padding: int = 0) -> Batch:
    """Random tokens; the first sequence begins with `padding` tokens of padding, and every next one with one less."""
    generator = torch.Generator().manual_seed(size * 1000 + length)
    tokens = torch.randint(3, VOCABULARY, (size, length), generator=generator)
    mask = torch.ones_like(tokens)
    for row in range(size):
        mask[row, : max(padding - row, 0)] = 0
    return Batch(tokens, mask, (mask.cumsum(1) - 1).clamp(min=0))


def distance(one: Tensor, other: Tensor, attention_mask: Tensor) -> float:
    """Largest difference at tokens that are no padding."""
    return float(((one - other).detach() * attention_mask[..., None]).abs().max())


@cache
def eager(family: str) -> nn.Module:
    """The tiny model with transformers' own plain attention: the reference for everything. Not to be changed."""
    model = build(family)
    model.set_attn_implementation("eager")
    return model


def eager_logits(family: str, inputs: Batch) -> Tensor:
    """The reference's logits."""
    with torch.no_grad():
        logits: Tensor = eager(family)(**inputs._asdict()).logits
    return logits


@cache
def _captured(family: str) -> Program:
    return capture(tiny(family))


def captured(family: str) -> Program:
    """The tiny model of `family` at stage `captured`, to edit at will."""
    return _captured(family).clone()


@cache
def _canonical(family: str) -> Program:
    program = captured(family)
    Pipeline((Canonicalize(),)).run(program, verify=1)
    return program


def canonical(family: str) -> Program:
    """The tiny model of `family` at stage `canonical`, to edit at will."""
    return _canonical(family).clone()


def canonicalized(module: nn.Module, *examples: Tensor, dims: Dims | None = None) -> tuple[Program, PassResult]:
    """A module's canonical form and what `canonicalize` says about it, its numbers verified."""
    program = capture(module, examples, dims=dims)
    result = Pipeline((Canonicalize(),)).run(program, verify=2)
    return program, result.passes[0].result
