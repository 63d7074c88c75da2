"""Analyses: computed once, kept, and dropped when what they rest on changes."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from skink.errors import CalibrationError
from skink.graph.analyses import Analyses, Analysis, Basis, Cost, Covariances, Mixing
from skink.graph.calibration import input_covariances
from skink.graph.capture import capture
from skink.graph.cost import program_cost
from skink.graph.mixing import token_mixing
from skink.graph.passes import Context, Pass, PassResult
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program, Stage
from skink.graph.rewriter import Rewriter
from tests.programs import canonical

aten = torch.ops.aten
COMPUTED: list[str] = []


@dataclass(frozen=True)
class OfGraph(Analysis[int]):
    """Counts nodes, and says so."""

    scale: int = 1

    name: ClassVar[str] = "of-graph"
    rests_on: ClassVar[frozenset[Basis]] = frozenset({"graph"})

    def compute(self, program: Program, context: Context) -> int:
        COMPUTED.append(self.name)
        return self.scale * len(program.graph.nodes)


@dataclass(frozen=True)
class OfWeights(Analysis[float]):
    """Adds weights up."""

    name: ClassVar[str] = "of-weights"
    rests_on: ClassVar[frozenset[Basis]] = frozenset({"weights"})

    def compute(self, program: Program, context: Context) -> float:
        COMPUTED.append(self.name)
        return sum(float(tensor.sum()) for _, tensor in program.weights())


@dataclass(frozen=True)
class OfText(Analysis[int]):
    """Counts tokens."""

    name: ClassVar[str] = "of-text"
    rests_on: ClassVar[frozenset[Basis]] = frozenset({"calibration"})

    def compute(self, program: Program, context: Context) -> int:
        COMPUTED.append(self.name)
        return 0 if context.calibration is None else context.calibration.numel()


ALL: tuple[Analysis[Any], ...] = (OfGraph(), OfWeights(), OfText())


@dataclass(frozen=True)
class Asks(Pass):
    """Asks for everything, and changes nothing."""

    name: ClassVar[str] = "asks"
    summary: ClassVar[str] = "for tests"
    requires: ClassVar[Stage] = Stage.CAPTURED

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        for analysis in ALL:
            context.analysis(analysis, program)
        return PassResult(edits=0)


@dataclass(frozen=True)
class Doubles(Asks):
    """Multiplies the result of a linear layer; in place of its weight, if so wanted."""

    name: ClassVar[str] = "doubles"
    exactness = "approximate"

    weight: bool = False

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        node = program.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
        with rewriter.before(node.next):
            if self.weight:
                doubled = rewriter.weight("doubled", program.weight("weight") * 2)
                new = rewriter.call(aten.linear.default, node.args[0], doubled, node.args[2])
            else:
                new = rewriter.call(aten.mul.Tensor, node, 2.0)
        rewriter.replace(node, new, rule="double")
        assert context.analysis(OfGraph(), program) == len(program.graph.nodes)
        return PassResult(edits=rewriter.count)


class Keeps(Doubles):
    """Knows that nodes are as many."""

    name: ClassVar[str] = "keeps"
    preserves: ClassVar[frozenset[str]] = frozenset({"of-graph"})


@pytest.fixture(autouse=True)
def nothing_computed() -> None:
    COMPUTED.clear()


def program() -> Program:
    return capture(nn.Linear(4, 4), (torch.zeros(2, 4),))


def computed(*passes: Pass) -> list[str]:
    Pipeline(passes).run(program(), calibration=torch.zeros(2, 3, dtype=torch.int64), verify=0)
    return COMPUTED


def test_nothing_is_computed_twice_while_nothing_changes() -> None:
    assert computed(Asks(), Asks(), Asks()) == ["of-graph", "of-weights", "of-text"]


def test_a_change_of_the_graph_drops_what_rests_on_it() -> None:
    assert computed(Asks(), Doubles(), Asks()) == [
        *("of-graph", "of-weights", "of-text"),
        "of-graph",  # within the pass, after its edit
        "of-graph",
    ]


def test_a_change_of_weights_drops_what_rests_on_them() -> None:
    assert computed(Asks(), Doubles(weight=True), Asks())[4:] == ["of-graph", "of-weights"]


def test_what_a_pass_preserves_is_kept() -> None:
    assert computed(Asks(), Keeps(), Asks()) == ["of-graph", "of-weights", "of-text", "of-graph"]


def test_options_are_part_of_the_question() -> None:
    subject, context = program(), Context()
    one = context.analysis(OfGraph(), subject)
    assert context.analysis(OfGraph(scale=2), subject) == 2 * one
    assert context.analysis(OfGraph(scale=2), subject) == 2 * one
    assert len(COMPUTED) == 2


def test_another_program_or_text_is_another_question() -> None:
    subject, context = program(), Context()
    context.analysis(OfGraph(), subject)
    context.analysis(OfGraph(), subject.clone())
    assert COMPUTED == ["of-graph", "of-graph"]
    context.analysis(OfText(), subject)
    other = replace(context, calibration=torch.zeros(1, 2))
    assert other.analysis(OfText(), subject) == 2
    assert other.analysis(OfText(), subject) == 2
    assert COMPUTED[2:] == ["of-text", "of-text"]


def test_dropping_by_hand() -> None:
    subject, context = program(), Context()
    analyses: Analyses = context.analyses
    for changed, wanted in (({"calibration"}, ["of-text"]), ({"graph", "weights"}, ["of-graph", "of-weights"])):
        for analysis in ALL:
            context.analysis(analysis, subject)
        COMPUTED.clear()
        analyses.drop(subject, changed)  # type: ignore[arg-type]
        for analysis in ALL:
            context.analysis(analysis, subject)
        assert wanted == COMPUTED


def test_those_that_ship_give_what_their_functions_give() -> None:
    subject = canonical("llama")
    windows = torch.randint(0, 90, (2, 8))
    context = Context(calibration=windows)
    assert context.analysis(Cost(context=9), subject) == program_cost(subject, context=9)
    found = context.analysis(Covariances(), subject)
    names = ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    for name, wanted in input_covariances(subject, windows, names).items():
        torch.testing.assert_close(found[name].total, wanted.total)
    assert len(found) == 15
    assert list(context.analysis(Covariances(names=(names[0],)), subject)) == names[:1]
    padding = torch.ones_like(windows)
    padding[0, 5:] = 0
    shorter = replace(context, padding=padding).analysis(Covariances(), subject)
    assert [found[names[0]].tokens, shorter[names[0]].tokens] == [16, 13]
    mixing = context.analysis(Mixing(), subject)
    assert mixing.known == token_mixing(subject).known
    assert len(mixing.known) == 2


def test_covariances_need_text() -> None:
    with pytest.raises(CalibrationError, match=r"\[CALIBRATION-002\] covariances need calibration text"):
        Context().analysis(Covariances(), program())
