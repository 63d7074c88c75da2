"""Changed programs, and what trains in a module."""

from torch import nn

from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.passes.decompose.low_rank import LowRank
from tests.programs import canonical


def factored(family: str = "llama") -> tuple[Program, Program]:
    """A program and what it was before its linear layers were factored."""
    original = canonical(family)
    program = canonical(family)
    Pipeline((LowRank(method="plain", keep=0.6),), start=program.stage).run(program)
    return program, original


def trained(module: nn.Module) -> set[str]:
    """Names of the parameters that take gradients."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}
