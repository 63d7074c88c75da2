"""Matching: what a pattern means, and the reason where it does not match."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from skink.graph.capture import capture
from skink.graph.matcher import explain, find
from skink.graph.pattern import LAST_AXIS, Match, NoMatch, Rule, Weight, any_of, op_name, ops
from skink.graph.program import Program
from tests.modules import One, Two, parameter

aten = torch.ops.aten
X = torch.randn(2, 3, 4)


def rule_of(pattern: Any, **options: Any) -> Rule:
    return Rule("test", pattern=pattern, rewrite=lambda rewriter, found: found.root, **options)


def last(program: Program) -> fx.Node:
    node = program.graph.output_node().args[0][0]
    assert isinstance(node, fx.Node)
    return node


def matched(pattern: Any, body: Any, x: torch.Tensor = X, **parts: Any) -> Match | NoMatch:
    return explain(rule_of(pattern), last(capture(One(body, **parts), (x,))))


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
    assert reason(pattern, lambda self, x: x.pow(2).mean(-1)) == "True expected, found no such argument"


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


def test_an_argument_left_out_is_not_one_that_the_pattern_names() -> None:
    pattern = lambda x, keep: ops.mean(x, [-1], keep)  # noqa: E731
    assert reason(pattern, lambda self, x: x.mean(-1)) == "keep is not given"
    assert isinstance(matched(pattern, lambda self, x: x.mean(-1, keepdim=True)), Match)


def test_arguments_given_by_name_have_their_places() -> None:
    program = capture(One(lambda self, x: torch.relu(x)), (X,))
    node = last(program)
    with program.graph.inserting_after(node):
        mean = program.graph.call_function(aten.mean.dim, (node,), {"keepdim": True, "dim": [-1]})
    mean.meta = dict(node.meta)
    pattern = lambda x: ops.mean(ops.relu(x), [-1], True)  # noqa: E731
    for search in (explain, find):
        assert isinstance(search(rule_of(pattern), mean), Match)


def test_the_last_axis_however_it_is_written() -> None:
    pattern = lambda x: ops.mean(x, LAST_AXIS)  # noqa: E731
    assert isinstance(matched(pattern, lambda self, x: x.mean(-1)), Match)
    assert isinstance(matched(pattern, lambda self, x: x.mean(2)), Match)
    assert reason(pattern, lambda self, x: x.mean(1)) == "the last axis expected, found [1]"


def of_a_weight(x: Tensor, weight: Weight, slope: float) -> Any:
    return ops.mul(ops.mul(x, weight), slope)


def test_annotations_restrict_what_an_argument_stands_for() -> None:
    found = matched(of_a_weight, lambda self, x: x * self.w * 2, w=parameter(4))
    assert isinstance(found, Match)
    assert (found["weight"].target, found["slope"]) == ("w", 2)
    assert reason(of_a_weight, lambda self, x: x * torch.relu(x) * 2) == "weight is not a weight"
    assert reason(of_a_weight, lambda self, x: x * self.w * torch.relu(x), w=parameter(4)) == "slope is not a number"


def test_alternatives_bind_what_they_mention() -> None:
    def pattern(x: Tensor, slope: float, shift: float) -> Any:
        return ops.relu(any_of(ops.mul(x, slope), ops.add(x, shift), x))

    scaled = matched(pattern, lambda self, x: torch.relu(x * 3))
    assert isinstance(scaled, Match)
    assert scaled.bindings == {"x": scaled["x"], "slope": 3}
    shifted = matched(pattern, lambda self, x: torch.relu(x + 3))
    assert isinstance(shifted, Match)
    assert (shifted.get("slope"), shifted.get("shift"), shifted["x"].op) == (None, 3, "placeholder")
    plain = matched(pattern, lambda self, x: torch.relu(torch.cos(x)))
    assert isinstance(plain, Match)
    assert set(plain.bindings) == {"x"}


def test_a_later_part_decides_between_alternatives() -> None:
    # The first alternative fits the left side; only the second lets both sides be of one x.
    pattern = lambda x: ops.sub(any_of(x, ops.relu(x)), x)  # noqa: E731
    found = matched(pattern, lambda self, x: torch.relu(x) - x)
    assert isinstance(found, Match)
    assert found["x"].op == "placeholder"


def test_a_call_used_twice_must_be_one_node() -> None:
    def pattern(x: Tensor) -> Any:
        inner = ops.relu(x)
        return ops.mul(ops.cos(inner), ops.sin(inner))

    def body(self: One, x: Tensor) -> Tensor:
        inner = torch.relu(x)
        return torch.cos(inner) * torch.sin(inner)

    assert isinstance(matched(pattern, body), Match)
    twice = lambda self, x: torch.cos(torch.relu(x)) * torch.sin(torch.relu(x))  # noqa: E731
    assert reason(pattern, twice) == "one relu is meant twice, and there are two"


def test_inner_values_may_be_read_elsewhere_unless_the_rule_is_exclusive() -> None:
    def body(self: One, x: Tensor) -> tuple[Tensor, ...]:
        inner = torch.relu(x)
        return torch.cos(inner), torch.sin(inner), torch.tanh(inner)

    node = last(capture(One(body), (X,)))
    pattern = lambda x: ops.cos(ops.relu(x))  # noqa: E731
    assert isinstance(explain(rule_of(pattern), node), Match)
    found = explain(rule_of(pattern, exclusive=True), node)
    assert isinstance(found, NoMatch)
    assert (found.reason, op_name(found.node)) == ("sin outside of the match reads an inner value", "relu")


def three_of_one(x: Tensor, q: Weight, k: Weight, v: Weight) -> Any:
    return ops.linear(x, q), ops.linear(x, k), ops.linear(x, v)


def test_several_outputs_are_found_from_the_first() -> None:
    def body(self: One, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.nn.functional.linear(x, weight) for weight in (self.a, self.b, self.c))

    program = capture(One(body, a=parameter(2, 4), b=parameter(2, 4), c=parameter(2, 4)), (X,))
    found = explain(rule_of(three_of_one), last(program))
    assert isinstance(found, Match)
    assert [found[name].target for name in "qkv"] == ["a", "b", "c"]
    assert found.roots == tuple(program.graph.output_node().args[0])
    two = capture(One(lambda self, x: (self.a(x), self.b(x)), a=nn.Linear(4, 2, False), b=nn.Linear(4, 2, False)), (X,))
    missing = explain(rule_of(three_of_one), last(two))
    assert isinstance(missing, NoMatch)
    assert missing.reason == "no linear beside it"


def test_further_outputs_may_lie_behind_casts_and_other_calls() -> None:
    def pattern(x: Tensor, y: Tensor) -> Any:
        return ops.cos(x), ops.tanh(ops.mul(ops.relu(x), y))

    found = explain(
        rule_of(pattern),
        last(capture(Two(lambda self, x, y: (torch.cos(x), torch.tanh(torch.relu(x.float()) * y))), (X.half(), X))),
    )
    assert isinstance(found, Match)
    assert [op_name(node) for node in found.roots] == ["cos", "tanh"]


def test_outputs_that_cannot_be_computed_at_one_place_do_not_match() -> None:
    def pattern(x: Tensor, y: Tensor) -> Any:
        return ops.cos(x), ops.mul(x, y)

    def body(self: One, x: Tensor) -> tuple[Tensor, ...]:
        first = torch.cos(x)
        return first, x * torch.sin(first)

    found = explain(rule_of(pattern), last(capture(One(body), (X,))))
    assert isinstance(found, NoMatch)
    assert found.reason == "y comes after the first of the outputs"


def test_the_reason_is_that_of_the_attempt_that_came_furthest() -> None:
    pattern = lambda x: ops.relu(any_of(ops.cos(x), ops.mul(ops.sin(x), 2.0)))  # noqa: E731
    found = matched(pattern, lambda self, x: torch.relu(torch.sin(x) * 3.0))
    assert isinstance(found, NoMatch)
    assert (found.reason, found.progress) == ("2.0 expected, found 3.0", 4)
