"""Canonicalizing small modules, for the tests of raising rules."""

from typing import Any

import torch
from torch import Tensor, nn

from skink.graph.passes import PassResult
from skink.graph.program import Program
from tests.modules import results
from tests.programs import canonicalized

X = torch.randn(2, 3, 8)
HEADS = torch.randn(2, 4, 3, 8)


def raised(program: Program) -> list[str]:
    """The ops of ours, the linear layers and layer norms in the program, as printed."""
    lines = [line.partition(" = ")[2].partition("  # ")[0] for line in str(program).splitlines()]
    return [line for line in lines if line.startswith(("skink.", "aten.linear", "aten.layer_norm"))]


def check(module: nn.Module, *examples: Tensor, dims: Any = None) -> tuple[list[str], list[str], Program]:
    """Canonicalized, verified against the module itself: (what was raised, reasons of refusals, program)."""
    program, result = canonicalized(module, *examples, dims=dims)
    assert isinstance(result, PassResult)
    for one, other in zip(program(*examples), results(module, *examples), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other)
    return raised(program), [entry.reason for entry in result.refused], program
