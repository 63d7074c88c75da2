"""Matching: what a pattern means, and the reason where it does not match."""

from typing import Any

import pytest
import torch
from torch import fx

from skink.graph.capture import capture
from skink.graph.pattern import (
    Call,
    Match,
    NoMatch,
    Rule,
    apply_rules,
    below_widening,
    match,
    op_name,
    ops,
    through_casts,
)
from skink.graph.program import Program
from skink.graph.rewriter import Rewriter
from tests.modules import One, Two, parameter

aten = torch.ops.aten
X = torch.randn(2, 3, 4)


def traced(pattern: Any) -> Call:
    return Rule("test", pattern=pattern, rewrite=lambda rewriter, found: found.root).traced


def last(program: Program) -> fx.Node:
    node = program.graph.output_node().args[0][0]
    assert isinstance(node, fx.Node)
    return node


def matched(pattern: Any, body: Any, x: torch.Tensor = X, **parts: Any) -> Match | NoMatch:
    return match(traced(pattern), last(capture(One(body, **parts), (x,))))


def reason(pattern: Any, body: Any, x: torch.Tensor = X, **parts: Any) -> str:
    found = matched(pattern, body, x, **parts)
    assert isinstance(found, NoMatch)
    assert isinstance(found.node, fx.Node)
    return found.reason


def test_bindings_are_named_after_the_patterns_arguments() -> None:
    found = matched(lambda x, slope: ops.mul(ops.relu(x), slope), lambda self, x: torch.relu(x) * 0.5)
    assert isinstance(found, Match)
    assert found["x"].target == "x"
    assert found["slope"] == 0.5
    assert op_name(found.root) == "mul"


def test_sums_and_products_match_in_either_order() -> None:
    pattern = lambda x, w: ops.add(ops.mul(x, w), ops.relu(x))  # noqa: E731
    for body in (
        lambda self, x: x * self.w + torch.relu(x),
        lambda self, x: self.w * x + torch.relu(x),
        lambda self, x: torch.relu(x) + x * self.w,
        lambda self, x: torch.relu(x) + self.w * x,
    ):
        found = matched(pattern, body, w=parameter(4))
        assert isinstance(found, Match)
        assert found["x"].target == "x"
        assert found["w"].target == "w"


def test_other_operators_match_in_their_order_only() -> None:
    pattern = lambda x: ops.sub(ops.relu(x), x)  # noqa: E731
    assert isinstance(matched(pattern, lambda self, x: torch.relu(x) - x), Match)
    assert reason(pattern, lambda self, x: x - torch.relu(x)) == "relu expected, found placeholder"


def test_one_of_several_operators() -> None:
    pattern = lambda x: ops.any_of("relu", "tanh")(x)  # noqa: E731
    assert isinstance(matched(pattern, lambda self, x: torch.tanh(x)), Match)
    assert reason(pattern, lambda self, x: torch.cos(x)) == "relu or tanh expected, found cos"


def test_an_argument_used_twice_must_be_one_value() -> None:
    pattern = lambda x: ops.mul(x, ops.relu(x))  # noqa: E731
    assert isinstance(matched(pattern, lambda self, x: x * torch.relu(x)), Match)
    assert reason(pattern, lambda self, x: x * torch.relu(x + 1)) == "x is used twice, for two different values"


def test_numbers_and_lists_must_be_equal() -> None:
    pattern = lambda x: ops.mean(ops.pow(x, 2), [-1], True)  # noqa: E731
    assert isinstance(matched(pattern, lambda self, x: x.pow(2).mean(-1, keepdim=True)), Match)
    assert reason(pattern, lambda self, x: x.pow(3).mean(-1, keepdim=True)) == "2 expected, found 3"
    assert reason(pattern, lambda self, x: x.pow(2).mean(1, keepdim=True)) == "-1 expected, found 1"
    assert reason(pattern, lambda self, x: x.pow(2).mean((1, 2), keepdim=True)) == "[-1] expected, found [1, 2]"
    assert reason(pattern, lambda self, x: x.pow(2).mean(-1)) == "3 arguments expected, found 2"


@pytest.mark.parametrize(
    ("body", "given"),
    [
        (lambda self, x: torch.add(x, torch.relu(x), alpha=2), "alpha=2 is given"),
        (lambda self, x: torch.add(x, torch.relu(x), alpha=-1), "alpha=-1 is given"),
        (lambda self, x: x[..., :2] + torch.relu(x)[..., :2], None),
    ],
)
def test_arguments_that_the_pattern_does_not_mention_must_be_left_out(body: Any, given: str | None) -> None:
    found = matched(lambda x, y: ops.add(x, y), body)
    assert (found.reason if isinstance(found, NoMatch) else None) == given


def test_steps_of_slices_count() -> None:
    pattern = lambda x: ops.neg(ops.slice(x, 2, 0, 3))  # noqa: E731
    assert isinstance(matched(pattern, lambda self, x: -x[..., :3]), Match)
    assert reason(pattern, lambda self, x: -x[..., :3:2]) == "step=2 is given"


def test_an_ellipsis_leaves_further_arguments_to_the_check() -> None:
    pattern = lambda x, y: ops.add(x, y, ...)  # noqa: E731
    assert isinstance(matched(pattern, lambda self, x: torch.add(x, torch.relu(x), alpha=2)), Match)


def test_casts_on_the_way_are_looked_through() -> None:
    pattern = lambda x: ops.relu(ops.mul(x, 2.0))  # noqa: E731
    found = matched(pattern, lambda self, x: torch.relu((x.float() * 2.0).to(torch.bfloat16)), X.bfloat16())
    assert isinstance(found, Match)
    assert found["x"].target == "x"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda self, x: torch.relu((x * 2.0).half()), "torch.float16 on the way loses digits that the pattern keeps"),
        (lambda self, x: torch.relu((x * 2.0).int()), "mul expected, found a cast to torch.int32"),
        (lambda self, x: torch.relu((x * 2.0).bool().float()), "mul expected, found a cast to torch.bool"),
    ],
)
def test_casts_that_lose_digits_are_not(body: Any, why: str) -> None:
    assert reason(lambda x: ops.relu(ops.mul(x, 2.0)), body) == why


def test_bindings_look_through_widening_only() -> None:
    program = capture(Two(lambda self, x, y: (x.float() + 1, y.float() + 1)), (X.half(), X.double()))
    (half, double) = (result.args[0] for result in program.graph.output_node().args[0])
    assert below_widening(half).target == "x"
    assert below_widening(double) is double
    assert through_casts(double).target == "y"


def test_names_of_operators() -> None:
    program = capture(One(lambda self, x: torch.split(x, 2, -1)[1]), (X,))
    assert [op_name(node) for node in program.graph.nodes] == ["", "split", "getitem", ""]


def double(rewriter: Rewriter, found: Match) -> fx.Node:
    return rewriter.call(aten.mul.Tensor, found["x"], 2.0)


def test_the_first_rule_that_matches_wins_and_refusals_are_kept() -> None:
    program = capture(One(lambda self, x: torch.relu(torch.relu(x) + 1)), (X,))
    refuse_inner = Rule(
        "refuse-inner",
        pattern=lambda x: ops.relu(x),
        rewrite=double,
        check=lambda found: NoMatch("its input is an input", found.root) if found["x"].op == "placeholder" else None,
    )
    second = Rule("second", pattern=lambda x: ops.relu(x), rewrite=lambda r, m: r.call(aten.neg.default, m["x"]))
    rewriter = Rewriter(program, "test")
    refused = apply_rules(program, rewriter, [refuse_inner, second])
    assert [(name, [entry.reason for entry in found]) for name, found in refused.items()] == [
        ("refuse-inner", ["its input is an input"])
    ]
    assert [edit.rule for edit in program.edits] == ["second", "refuse-inner"]
    torch.testing.assert_close(program(X)[0], (-X + 1) * 2)


def test_overlapping_matches_are_rewritten_one_after_the_other() -> None:
    program = capture(One(lambda self, x: torch.relu(torch.relu(torch.relu(x)))), (X,))
    rule = Rule(
        "twice", pattern=lambda x: ops.relu(ops.relu(x)), rewrite=lambda r, m: r.call(aten.relu.default, m["x"])
    )
    rewriter = Rewriter(program, "test")
    apply_rules(program, rewriter, [rule])
    assert rewriter.count == 1 + 1
    torch.testing.assert_close(program(X)[0], torch.relu(X))


def test_a_result_of_another_dtype_is_cast_to_what_it_stands_for() -> None:
    program = capture(One(lambda self, x: x.float() * 3.0), (X.half(),))
    rule = Rule("narrow", pattern=lambda x: ops.mul(x, 3.0), rewrite=double)
    apply_rules(program, Rewriter(program, "test"), [rule])
    result = program(X.half())[0]
    assert result.dtype is torch.float32
    torch.testing.assert_close(result, (X.half() * 2).float())


def test_dead_matches_are_left_alone() -> None:
    program = capture(One(lambda self, x: torch.relu(x)), (X,))
    node = last(program)
    with program.graph.inserting_before(node):
        dead = program.graph.call_function(aten.relu.default, (node.args[0],))
    dead.meta = dict(node.meta)
    rewriter = Rewriter(program, "test")
    apply_rules(program, rewriter, [Rule("double", pattern=lambda x: ops.relu(x), rewrite=double)])
    assert rewriter.count == 1
