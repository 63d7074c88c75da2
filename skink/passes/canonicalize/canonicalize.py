"""`canonicalize`: from the exporter's graph to the form that passes work on.

Leftovers of the exporter go, `rms_norm`, `rotary` and `attention` are raised, linear layers stay as they are. Exact.
"""

from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

from skink.graph.driver import apply_rules
from skink.graph.passes import Context, Pass, PassResult
from skink.graph.program import Program, Stage
from skink.graph.rewriter import Rewriter
from skink.passes.canonicalize.clean import clean, drop_casts
from skink.passes.canonicalize.raise_rules import RULES


@dataclass(frozen=True)
class Canonicalize(Pass):
    """No options."""

    name: ClassVar[str] = "canonicalize"
    summary: ClassVar[str] = "clean the captured graph and raise attention, rms_norm and rotary"
    requires: ClassVar[Stage] = Stage.CAPTURED
    yields: ClassVar[Stage | None] = Stage.CANONICAL

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        clean(program, rewriter)
        refused = apply_rules(program, rewriter, RULES)
        drop_casts(program, rewriter)
        clean(program, rewriter)
        return PassResult(edits=rewriter.count, refused=tuple(chain.from_iterable(refused.values())))
