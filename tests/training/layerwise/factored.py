"""Factored tiny models, made once per process."""

from functools import cache

from skink.graph.program import Program
from tests.training import students


@cache
def _factored(family: str) -> tuple[Program, Program]:
    return students.factored(family)


def factored(family: str = "llama") -> tuple[Program, Program]:
    """A factored model, to be changed at will, and its original."""
    program, original = _factored(family)
    return program.clone(), original
