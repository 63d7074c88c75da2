"""What passes ask about a program, computed once and kept until a pass changes what the answer rests on.

    cost = context.analysis(Cost(), program)

The pipeline hands one cache to all its passes. After each pass that edited the program it drops the answers that rest
on what the pass changed; a pass that knows an answer to hold still names it in `preserves`. Within a pass, an answer
given before an edit is not given again after it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from skink.graph.program import Program

if TYPE_CHECKING:
    from skink.graph.calibration import Covariance
    from skink.graph.cost import ProgramCost
    from skink.graph.mixing import TokenMixing
    from skink.graph.passes import Context

Basis = Literal["graph", "weights", "calibration"]
T = TypeVar("T")


@dataclass(frozen=True)
class Analysis(Generic[T]):
    """A question about a whole program. Subclass as a frozen dataclass; fields are what is asked, and make the key.

    Class attributes:
        name: kebab-case; what a pass names in `preserves`.
        rests_on: what a change of makes the answer void.
    """

    name: ClassVar[str]
    rests_on: ClassVar[frozenset[Basis]]

    def compute(self, program: Program, context: "Context") -> T:
        """The answer, from the program as it is."""
        raise NotImplementedError


@dataclass
class _Kept:
    """An answer, and what it was given for."""

    value: Any
    program: Program
    edits: int
    calibration: Any
    padding: Any


class Analyses:
    """The answers so far."""

    def __init__(self) -> None:
        self._kept: dict[Analysis[Any], _Kept] = {}

    def get(self, analysis: Analysis[T], program: Program, context: "Context") -> T:
        """The answer: the one that is kept where it holds for this program as it is now, else a new one."""
        kept = self._kept.get(analysis)
        if kept is None or not _holds(kept, analysis, program, context):
            value = analysis.compute(program, context)
            kept = _Kept(value, program, len(program.edits), context.calibration, context.padding)
            self._kept[analysis] = kept
        answer: T = kept.value
        return answer

    def drop(self, program: Program, changed: Collection[Basis], *, preserves: Collection[str] = ()) -> None:
        """Forget what rests on anything in `changed`, but for the analyses named in `preserves`.

        Args:
            program: as the pass left it; what is kept holds for it from now on.
            changed: what the pass changed.
            preserves: names of analyses whose answers hold still.
        """
        for analysis, kept in list(self._kept.items()):
            if analysis.name in preserves or not analysis.rests_on & set(changed):
                kept.edits = len(program.edits)
            else:
                del self._kept[analysis]


def _holds(kept: _Kept, analysis: Analysis[Any], program: Program, context: "Context") -> bool:
    if "calibration" in analysis.rests_on and (
        kept.calibration is not context.calibration or kept.padding is not context.padding
    ):
        return False
    return kept.program is program and kept.edits == len(program.edits)


def weights_state(program: Program) -> dict[str, tuple[int, int, int]]:
    """What tells whether a program's weights are the ones they were."""
    return {
        name: (id(tensor), 0 if tensor.is_meta else tensor.data_ptr(), tensor._version)
        for name, tensor in program.weights()
    }


# The modules that compute answers import passes.py, which imports this one; so each is imported when it is asked.


@dataclass(frozen=True)
class Cost(Analysis["ProgramCost"]):
    """What the program costs, see `program_cost`.

    Args:
        context: how many tokens a generated one attends to.
    """

    context: int = 512

    name: ClassVar[str] = "cost"
    rests_on: ClassVar[frozenset[Basis]] = frozenset({"graph", "weights"})

    def compute(self, program: Program, context: "Context") -> "ProgramCost":
        from skink.graph.cost import program_cost

        return program_cost(program, context=self.context)


@dataclass(frozen=True)
class Covariances(Analysis["dict[str, Covariance]"]):
    """The covariance of the inputs of every linear weight, or of some, all held at once.

    For passes that want the statistics of the whole program as it was before their own edits; one that uses each
    layer's statistics and lets them go takes `stream_covariances`.

    Args:
        names: qualified names of linear weights; empty: all.
    """

    names: tuple[str, ...] = ()

    name: ClassVar[str] = "covariances"
    rests_on: ClassVar[frozenset[Basis]] = frozenset({"graph", "weights", "calibration"})

    def compute(self, program: Program, context: "Context") -> "dict[str, Covariance]":
        from skink.errors import CalibrationError
        from skink.graph.calibration import input_covariances
        from skink.graph.passes import linear_weight

        if context.calibration is None:
            raise CalibrationError(
                "CALIBRATION-002",
                "covariances need calibration text, and none was given.",
                fix="give --calibration FILES (in Python calibration=...).",
            )
        found = (linear_weight(program, node) for node in program.graph.nodes)
        names = self.names or tuple(dict.fromkeys(name for name in found if name is not None))
        return input_covariances(
            program, context.calibration, names, progress=context.progress, padding=context.padding
        )


@dataclass(frozen=True)
class Mixing(Analysis["TokenMixing"]):
    """Which nodes are proven to treat every token by itself, see `token_mixing`."""

    name: ClassVar[str] = "token-mixing"
    rests_on: ClassVar[frozenset[Basis]] = frozenset({"graph"})

    def compute(self, program: Program, context: "Context") -> "TokenMixing":
        from skink.graph.mixing import token_mixing

        return token_mixing(program)
