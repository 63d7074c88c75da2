"""A pass for tests, with an option of every kind."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from skink.errors import check_range
from skink.graph.passes import Context, Pass, PassResult
from skink.graph.program import Program
from skink.graph.rewriter import Rewriter


@dataclass(frozen=True)
class Sample(Pass):
    """Does nothing."""

    name: ClassVar[str] = "sample"
    summary: ClassVar[str] = "for tests"

    keep: float = 0.5
    rounds: int = 3
    method: Literal["whitened", "plain", "off"] = "whitened"
    exact: bool = True
    layers: tuple[str, ...] = ()
    ranks: tuple[int, ...] = (1,)
    limit: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        check_range("keep", self.keep, low=0.0, high=1.0, open_low=True)

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        return PassResult(edits=0)
