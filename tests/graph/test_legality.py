"""Legality: each rule by a program that breaks it alone, and programs of every stage that break none."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from skink.graph.capture import capture
from skink.graph.legality import NODE_RULES, PROGRAM_RULES, illegal
from skink.graph.program import Program, Stage
from skink.graph.propagate import propagate
from skink.graph.state import derive_step
from skink.passes.lower import lower
from tests.modules import One
from tests.programs import canonical, captured

aten = torch.ops.aten


def plain() -> Program:
    return capture(One(lambda self, x: torch.relu(self.layer(x)), layer=nn.Linear(4, 6)), (torch.randn(2, 3, 4),))


def stepped() -> Program:
    return derive_step(canonical("llama"))


def lowered() -> Program:
    return lower(stepped())[0]


def relu(program: Program) -> Any:
    (node,) = program.graph.find_nodes(op="call_function", target=aten.relu.default)
    return node


def retarget(target: Any) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        relu(program).target = target

    return change


def call_module(program: Program) -> None:
    node = relu(program)
    with program.graph.inserting_before(node):
        node.replace_all_uses_with(program.graph.call_module("layer", (node.args[0],)))


def too_many(program: Program) -> None:
    relu(program).args = (*relu(program).args, 1)


def unknown_keyword(program: Program) -> None:
    relu(program).kwargs = {"slope": 1}


def given_twice(program: Program) -> None:
    relu(program).kwargs = {"self": relu(program).args[0]}


def too_few(program: Program) -> None:
    relu(program).args = ()


def at_stage(stage: Stage, change: Callable[[Program], None]) -> Callable[[Program], None]:
    def both(program: Program) -> None:
        program.stage = stage
        change(program)

    return both


def forget(program: Program) -> None:
    del program.graph_module.layer.bias


def unread(program: Program) -> None:
    program.set_weight("layer.extra", torch.zeros(2))


def tie(program: Program) -> None:
    program.aliases = {"head.weight": "body.weight"}


def one_more_input(program: Program) -> None:
    program.inputs = (*program.inputs, program.inputs[0])


def one_more_output(program: Program) -> None:
    program.outputs = (*program.outputs, "more")


def bare_output(program: Program) -> None:
    output = program.graph.output_node()
    output.args = (output.args[0][0],)


def number_as_output(program: Program) -> None:
    program.graph.output_node().args = ((3,),)


def state_of(**changes: Any) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        first, *rest = program.state
        program.state = (replace(first, **changes), *rest)

    return change


def state_too_soon(program: Program) -> None:
    program.stage = Stage.REWRITTEN


def swap_outputs(program: Program) -> None:
    output = program.graph.output_node()
    logits, first, *rest = output.args[0]
    output.args = ((first, logits, *rest),)


def other_input(program: Program) -> None:
    past = program.graph.find_nodes(op="placeholder")[len(program.inputs)]
    past.target = "past"


def past_unread(program: Program) -> None:
    past = program.graph.find_nodes(op="placeholder")[len(program.inputs)]
    (cat,) = past.users
    cat.args = ([cat.args[0][1]], cat.args[1])


def half_present(program: Program) -> None:
    output = program.graph.output_node()
    logits, first, *rest = output.args[0]
    with program.graph.inserting_before(output):
        half = program.graph.call_function(aten.to.dtype, (first, torch.float16))
    output.args = ((logits, half, *rest),)
    propagate(program)


def other_present(program: Program) -> None:
    output = program.graph.output_node()
    logits, first, *rest = output.args[0]
    with program.graph.inserting_before(output):
        turned = program.graph.call_function(aten.slice.Tensor, (first, 1, 0, 1))
    output.args = ((logits, turned, *rest),)
    propagate(program)


def lowered_in_name(program: Program) -> None:
    program.stage = Stage.LOWERED


def unbind(program: Program) -> None:
    for node in program.graph.nodes:
        node.meta.pop("kernel", None)


NODES = {
    "kind": "nodes-are-inputs-weights-calls-and-the-output",
    "function": "calls-are-operators-or-arithmetic-on-sizes",
    "namespace": "operators-are-of-aten-or-skink",
    "writes": "nothing-writes-to-its-argument",
    "arguments": "arguments-fit-the-schema",
    "leftover": "leftovers-of-the-exporter-are-gone",
    "unbound": "operators-of-skink-have-a-kernel",
    "kernel": "other-calls-are-kernels-of-aten-or-arithmetic-on-sizes",
}
PROGRAMS = {
    "exist": "weights-that-are-read-exist",
    "read": "weights-that-exist-are-read",
    "tied": "tied-names-have-a-weight",
    "inputs": "inputs-are-as-listed",
    "results": "results-are-as-listed",
    "stateless": "there-is-no-state-before-stepping",
    "listed": "state-is-listed-in-order",
    "fits": "state-has-inputs-and-outputs-that-fit",
}
BROKEN: list[tuple[Callable[[], Program], Callable[[Program], None], str, str]] = [
    (plain, call_module, NODES["kind"], "a node of kind 'call_module' is not legal at stage captured."),
    (plain, retarget(torch.relu), NODES["function"], "the function relu is not legal at stage captured."),
    (plain, retarget(setattr), NODES["function"], "the function setattr is not legal"),
    (plain, retarget(torch.ops.prims.sin.default), NODES["namespace"], "prims.sin.default, an operator of prims,"),
    (plain, retarget(aten.relu_.default), NODES["writes"], "aten.relu_.default, which writes to its argument,"),
    (plain, too_many, NODES["arguments"], "aten.relu.default with 2 arguments, where it takes 1,"),
    (plain, unknown_keyword, NODES["arguments"], "aten.relu.default with an argument 'slope'"),
    (
        plain,
        given_twice,
        NODES["arguments"],
        "aten.relu.default with an argument 'self', which it does not take",
    ),
    (plain, too_few, NODES["arguments"], "aten.relu.default without its argument 'self'"),
    (
        plain,
        at_stage(Stage.CANONICAL, retarget(aten.detach.default)),
        NODES["leftover"],
        "aten.detach.default, which the exporter left behind, is not legal at stage canonical.",
    ),
    (
        stepped,
        lowered_in_name,
        NODES["unbound"],
        "skink.rms_norm.default, which no kernel was chosen for,",
    ),
    (lowered, unbind, NODES["kernel"], "is not legal at stage lowered."),
    (plain, forget, PROGRAMS["exist"], "the weight 'layer.bias' is read and does not exist."),
    (plain, unread, PROGRAMS["read"], "the weight 'layer.extra' is kept and never read."),
    (plain, tie, PROGRAMS["tied"], "the name 'head.weight' is tied to the weight 'body.weight', which does not exist."),
    (plain, one_more_input, PROGRAMS["inputs"], "the graph has 1 inputs, and the program lists 2."),
    (plain, one_more_output, PROGRAMS["results"], "the graph has 1 results, and the program lists 2."),
    (plain, bare_output, PROGRAMS["results"], "one bare result instead of a tuple"),
    (plain, number_as_output, PROGRAMS["results"], "a result is 3, which is no node."),
    (stepped, state_too_soon, PROGRAMS["stateless"], "state is not legal at stage rewritten: past_key_values.0.key"),
    (stepped, state_of(name="past_key_values.0.value"), PROGRAMS["listed"], "past_key_values.0.value is listed twice."),
    (
        stepped,
        state_of(layer=2),
        PROGRAMS["listed"],
        "state past_key_values.0.key is of layer 2, and comes after",
    ),
    (stepped, state_of(growth="leaps"), PROGRAMS["listed"], "grows by 'leaps', which is none of append, ring, fixed."),
    (stepped, state_of(axis=4), PROGRAMS["listed"], "has its token axis at 4, and 4 dims."),
    (stepped, state_of(shape=("B", 2, 7, 16)), PROGRAMS["listed"], "grows, and its token axis has the size 7."),
    (stepped, swap_outputs, PROGRAMS["fits"], "present.0.key does not fit past_key_values.0.key: 3 dims after 4."),
    (stepped, other_input, PROGRAMS["fits"], "state past_key_values.0.key has the input 'past' in its place."),
    (stepped, past_unread, PROGRAMS["fits"], "state past_key_values.0.key is an input that nothing reads."),
    (stepped, half_present, PROGRAMS["fits"], "does not fit past_key_values.0.key: float16 after float32."),
    (stepped, other_present, PROGRAMS["fits"], "does not fit past_key_values.0.key: size 1 after 2 on axis 1."),
    (stepped, state_of(growth="fixed"), PROGRAMS["fits"], "does not fit past_key_values.0.key: size "),
]


@pytest.mark.parametrize(("make", "change", "rule", "reason"), BROKEN)
def test_what_breaks_a_rule(
    make: Callable[[], Program], change: Callable[[Program], None], rule: str, reason: str
) -> None:
    program = make()
    assert not list(illegal(program))
    change(program)
    assert reason in next(breach.reason for breach in illegal(program) if breach.rule == rule)


def test_every_rule_has_a_program_that_breaks_it() -> None:
    assert [rule.name for rule in NODE_RULES] == list(NODES.values())
    assert [rule.name for rule in PROGRAM_RULES] == list(PROGRAMS.values())
    assert {rule for _, _, rule, _ in BROKEN} == {*NODES.values(), *PROGRAMS.values()}


def test_a_breach_of_a_node_names_it() -> None:
    program = plain()
    node = relu(program)
    retarget(aten.relu_.default)(program)
    (breach,) = illegal(program)
    assert breach.node is node


def test_leftovers_are_legal_before_they_are_cleaned() -> None:
    program = plain()
    retarget(aten.detach.default)(program)
    assert not list(illegal(program))


def test_programs_of_every_family_are_legal_at_every_stage(family: str) -> None:
    whole = canonical(family)
    step = derive_step(whole)
    for program in (captured(family), whole, step, lower(whole)[0], lower(step)[0]):
        assert not list(illegal(program)), program.stage
