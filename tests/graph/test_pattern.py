"""The language of rules: tracing, kinds of arguments, and what lies below casts."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from skink.graph.capture import capture
from skink.graph.pattern import (
    Match,
    Rule,
    Weight,
    any_of,
    below_widening,
    is_cast_to,
    kind_fits,
    op_name,
    ops,
    parts,
    through_casts,
    through_float_casts,
)
from tests.modules import One, Two, parameter

X = torch.randn(2, 3, 4)


def rule_of(pattern: Any) -> Rule:
    return Rule("test", pattern=pattern, rewrite=lambda rewriter, found: found.root)


def test_bindings_look_through_widening_only() -> None:
    program = capture(Two(lambda self, x, y: (x.float() + 1, y.float() + 1)), (X.half(), X.double()))
    (half, double) = (result.args[0] for result in program.graph.output_node().args[0])
    assert below_widening(half).target == "x"
    assert below_widening(double) is double
    assert through_casts(double).target == "y"


@pytest.mark.parametrize(
    ("cast", "through"),
    [
        (lambda x: x.float(), True),
        (lambda x: x.double().float(), True),
        (lambda x: x.float().half(), True),
        (lambda x: x.bfloat16().float(), False),
        (lambda x: x.to(torch.int32).float(), False),
        (lambda x: x.bool(), False),
    ],
)
def test_casts_that_lose_nothing(cast: Any, through: bool) -> None:
    program = capture(Two(lambda self, x, y: (cast(x) + 1, y + 1)), (X.half(), X))
    below = through_float_casts(program.graph.output_node().args[0][0].args[0])
    assert (below.target == "x") is through
    assert below.op == "placeholder" or not through


def test_casts_to_what_reads_them_lose_nothing_that_counts() -> None:
    body = lambda self, x, y: (x.bfloat16() + y, x.half().bfloat16() + y)  # noqa: E731
    program = capture(Two(body), (X, X.bfloat16()))
    one, other = program.graph.output_node().args[0]
    assert through_float_casts(one.args[0], one).target == "x"
    assert op_name(through_float_casts(one.args[0])) == "to"
    assert op_name(through_float_casts(other.args[0], other)) == "to"
    assert through_float_casts(2.0) == 2.0


def test_names_of_operators() -> None:
    program = capture(One(lambda self, x: torch.split(x, 2, -1)[1]), (X,))
    assert [op_name(node) for node in program.graph.nodes] == ["", "split", "getitem", ""]


def test_a_rule_knows_its_outputs_and_how_far_it_reaches() -> None:
    def pattern(x: Tensor, w: Weight) -> Any:
        inner = ops.linear(x, w)
        return ops.relu(ops.cos(inner)), ops.tanh(any_of(inner, x))

    rule = rule_of(pattern)
    assert [output.names for output in rule.outputs] == [("relu",), ("tanh",)]
    assert rule.depth == 3
    names = [getattr(part, "name", None) or part.names[0] for part in parts(rule.outputs[1])]
    assert names == ["tanh", "linear", "x", "w", "x"]


def test_outputs_with_nothing_in_common_are_refused_when_the_rule_is_made() -> None:
    with pytest.raises(TypeError, match="rule test: output 1 shares no argument and no call with those before it"):
        rule_of(lambda x, y: (ops.relu(x), ops.cos(y)))


def test_kinds_of_arguments() -> None:
    program = capture(One(lambda self, x: (x * self.w.half(), x.shape[0] * x), w=parameter(4)), (X,))
    product, scaled = program.graph.output_node().args[0]
    weight, size = product.args[1], next(argument for argument in scaled.args if argument.op != "placeholder")
    assert kind_fits(Weight, weight) is None
    assert kind_fits(Weight, product) == "is not a weight"
    assert kind_fits(Tensor, product) is None
    assert kind_fits(Tensor, size) == kind_fits(Tensor, 1.0) == "is not a tensor"
    assert kind_fits(fx.Node, size) is None
    assert kind_fits(fx.Node, 3) == "is not a node"
    assert kind_fits(float, 3) is kind_fits(float, 0.5) is kind_fits(int, 3) is kind_fits(list, [1]) is None
    assert kind_fits(int, 0.5) == kind_fits(float, True) == kind_fits(float, size) == "is not a number"
    assert kind_fits(list, 3) == "is not a list"
    assert kind_fits(None, object()) is None


def test_what_is_only_cast_to_one_dtype() -> None:
    program = capture(One(lambda self, x: (torch.relu(x).half() * 2, torch.relu(x).half() * 3)), (X,))
    relu = program.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)[0]
    assert is_cast_to(relu, torch.float16)
    assert not is_cast_to(relu, torch.float64)


def test_a_match_answers_for_what_was_not_bound() -> None:
    node = capture(One(lambda self, x: torch.relu(x)), (X,)).graph.output_node()
    found = Match(node, {"x": 1})
    assert (found["x"], found.get("y"), found.get("y", 2)) == (1, None, 2)
