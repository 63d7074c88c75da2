"""A pass for tests of pipelines: one edit for each linear layer, of which some are wrong."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from skink.graph.passes import Context, Pass, PassResult
from skink.graph.program import Program, Stage
from skink.graph.rewriter import Rewriter

aten = torch.ops.aten


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the results of the first linear layers by these factors; a factor of zero makes the pass raise."""

    name: ClassVar[str] = "scale"
    summary: ClassVar[str] = "for tests"
    requires: ClassVar[Stage] = Stage.CAPTURED
    exactness: ClassVar[Literal["exact", "approximate"]] = "exact"

    factors: tuple[float, ...] = ()

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        nodes = program.graph.find_nodes(op="call_function", target=aten.linear.default)
        for node, factor in zip(nodes, self.factors, strict=False):
            if factor == 0:
                raise ZeroDivisionError("a factor of zero")
            with rewriter.before(node.next):
                new = rewriter.call(aten.mul.Tensor, node, factor, rule="scale")
                new.meta |= {key: node.meta[key] for key in ("module", "source") if key in node.meta}
            rewriter.replace(node, new, rule="scale")
        return PassResult(edits=rewriter.count)
