"""The quick half of matching finds what the half with reasons finds."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skink.graph.capture import capture
from skink.graph.matcher import explain, find
from skink.graph.pattern import LAST_AXIS, Match, Rule, any_of, ops
from tests.graph.random_programs import programs
from tests.modules import One, parameter

X = torch.randn(2, 3, 4)


def rule_of(pattern: Any, **options: Any) -> Rule:
    return Rule("test", pattern=pattern, rewrite=lambda rewriter, found: found.root, **options)


def test_a_quick_look_agrees_with_the_search() -> None:
    def body(self: One, x: Tensor) -> Tensor:
        return self.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) + torch.relu(x) * torch.cos(x)

    patterns = [
        lambda x, w, eps: ops.mul(w, ops.mul(x, ops.rsqrt(ops.add(ops.mean(ops.pow(x, 2), LAST_AXIS, True), eps)))),
        lambda x: ops.mul(ops.cos(x), ops.relu(x)),
        lambda x: ops.add(any_of(ops.neg(x), x), ops.mul(x, any_of(ops.sin(x), ops.cos(x)))),
        lambda x: ops.rsqrt(x),
    ]
    program = capture(One(body, w=parameter(4)), (X,))
    counts = []
    for pattern in patterns:
        matches = 0
        for node in program.graph.nodes:
            quick, full = find(rule_of(pattern), node), explain(rule_of(pattern), node)
            assert (full if isinstance(full, Match) else None) == quick
            matches += quick is not None
        counts.append(matches)
    assert counts == [1, 1, 0, 1]


_PATTERNS: list[Any] = [
    lambda x: ops.neg(ops.neg(x)),
    lambda x, y: ops.mul(ops.add(x, y), x),
    lambda x, y: ops.add(ops.mul(x, y), any_of(ops.neg(y), ops.tanh(x), x)),
    lambda x, y: ops.sub(any_of(ops.add(x, y), ops.mul(y, x)), y),
    lambda x: ops.add(any_of(ops.relu(x), x), any_of(x, ops.relu(x))),
    lambda x, y, z: ops.mul(ops.mul(x, y), ops.mul(y, z)),
    lambda x, w: ops.linear(any_of(ops.relu(ops.linear(x, w)), ops.add(x, x)), w),
]


@settings(deadline=None, max_examples=30)
@given(program=programs(), exclusive=st.booleans())
def test_the_two_agree_on_random_programs(program: Any, exclusive: bool) -> None:
    for pattern in _PATTERNS:
        rule = rule_of(pattern, exclusive=exclusive)
        for node in program.graph.nodes:
            full = explain(rule, node)
            assert find(rule, node) == (full if isinstance(full, Match) else None)
