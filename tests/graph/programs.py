"""Tiny decoders as canonical programs, captured once per process."""

from functools import cache
from typing import Any

from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.passes.canonicalize import Canonicalize
from tests.models import build, tiny


@cache
def canonical(family: str, **options: Any) -> Program:
    """The canonical program of `tiny(family)`, or of `build(family, **options)`. Shared: clone it before editing."""
    program = capture(build(family, **options) if options else tiny(family))
    Pipeline((Canonicalize(),)).run(program, verify=0)
    return program
