"""The driver: to a fixpoint, one walk for all rules, cycles named, refusals kept."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from skink.errors import RewriteError
from skink.graph.capture import capture
from skink.graph.driver import apply_rules
from skink.graph.pattern import Match, NoMatch, Rule, Weight, op_name, ops
from skink.graph.program import Program
from skink.graph.rewriter import Rewriter
from skink.settings import settings
from tests.modules import One

aten = torch.ops.aten
X = torch.randn(2, 3, 4)


def last(program: Program) -> fx.Node:
    node = program.graph.output_node().args[0][0]
    assert isinstance(node, fx.Node)
    return node


def renaming(name: str, one: str, other: Any) -> Rule:
    """A rule from a unary op to another."""
    return Rule(name, pattern=lambda x: getattr(ops, one)(x), rewrite=lambda rewriter, m: rewriter.call(other, m["x"]))


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
    # What another rule rewrote needs no reason any more.
    assert refused == {}
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


def test_refusals_are_kept_with_their_reasons() -> None:
    program = capture(One(lambda self, x: torch.relu(x) + torch.relu(x * 2)), (X,))
    rule = Rule(
        "never",
        pattern=lambda x: ops.relu(x),
        rewrite=double,
        check=lambda found: NoMatch(f"its input is a {found['x'].op}", found.root),
    )
    refused = apply_rules(program, Rewriter(program, "test"), [rule])
    assert [entry.reason for entry in refused["never"]] == [
        "its input is a placeholder",
        "its input is a call_function",
    ]


def test_what_a_rewrite_makes_possible_is_done() -> None:
    # cos(sin(x)) appears only once tanh has become sin, and the rules stand in the order that is worst for one walk.
    program = capture(One(lambda self, x: torch.relu(torch.cos(torch.tanh(x)))), (X,))
    rules = [
        Rule("third", pattern=lambda x: ops.relu(ops.neg(x)), rewrite=lambda r, m: r.call(aten.abs.default, m["x"])),
        Rule("second", pattern=lambda x: ops.cos(ops.sin(x)), rewrite=lambda r, m: r.call(aten.neg.default, m["x"])),
        renaming("first", "tanh", aten.sin.default),
    ]
    apply_rules(program, Rewriter(program, "test"), rules)
    assert [edit.rule for edit in program.edits] == ["first", "second", "third"]
    torch.testing.assert_close(program(X)[0], X.abs())
    assert apply_rules(program, Rewriter(program, "test"), rules) == {}
    assert len(program.edits) == 3


def test_rules_that_undo_each_other_are_named() -> None:
    program = capture(One(lambda self, x: torch.cos(x)), (X,))
    rules = [renaming("there", "cos", aten.sin.default), renaming("and-back", "sin", aten.cos.default)]
    with pytest.raises(RewriteError) as caught:
        apply_rules(program, Rewriter(program, "turn"), rules)
    assert caught.value.code == "REWRITE-001"
    assert "rules of pass turn undo each other without end: there -> and-back -> there." in str(caught.value)
    assert "modules.py" in caught.value.where


def test_a_rule_that_feeds_itself_is_named() -> None:
    program = capture(One(lambda self, x: torch.relu(x)), (X,))
    grow = Rule(
        "grow",
        pattern=lambda x: ops.relu(x),
        rewrite=lambda r, m: r.call(aten.relu.default, r.call(aten.neg.default, m["x"])),
    )
    with pytest.raises(RewriteError, match="without end: grow -> grow"):
        apply_rules(program, Rewriter(program, "test"), [grow])


def test_several_outputs_are_replaced_by_one_edit() -> None:
    def pattern(x: Tensor, a: Weight, b: Weight) -> Any:
        return ops.linear(x, a), ops.linear(x, b)

    def rewrite(rewriter: Rewriter, found: Match) -> list[fx.Node]:
        joined = rewriter.call(
            aten.linear.default, found["x"], rewriter.call(aten.cat.default, [found["a"], found["b"]])
        )
        return [rewriter.call(aten.slice.Tensor, joined, 2, start, start + 2) for start in (0, 2)]

    module = One(
        lambda self, x: (torch.relu(self.a(x)), self.b(x)), a=nn.Linear(4, 2, bias=False), b=nn.Linear(4, 2, bias=False)
    )
    program = capture(module, (X,))
    rewriter = Rewriter(program, "test")
    apply_rules(program, rewriter, [Rule("join", pattern=pattern, rewrite=rewrite)])
    assert rewriter.count == 1
    assert len(program.graph.find_nodes(op="call_function", target=aten.linear.default)) == 1
    with torch.no_grad():
        for found, wanted in zip(program(X), module(X), strict=True):
            torch.testing.assert_close(found, wanted)


def test_an_exclusive_rule_applies_once_the_other_reader_has_gone() -> None:
    def body(self: One, x: Tensor) -> Tensor:
        inner = torch.relu(x)
        return torch.cos(inner) + torch.tanh(inner)

    program = capture(One(body), (X,))
    rules = [
        Rule("fuse", pattern=lambda x: ops.cos(ops.relu(x)), rewrite=double, exclusive=True),
        Rule("drop", pattern=lambda x: ops.tanh(ops.relu(x)), rewrite=lambda r, m: r.call(aten.neg.default, m["x"])),
    ]
    apply_rules(program, Rewriter(program, "test"), rules)
    assert [edit.rule for edit in program.edits] == ["drop", "fuse"]


def test_a_rewrite_that_returns_what_it_matched_is_a_defect() -> None:
    program = capture(One(lambda self, x: torch.relu(x)), (X,))
    rule = Rule("same", pattern=lambda x: ops.relu(x), rewrite=lambda rewriter, found: found.root)
    with pytest.raises(TypeError, match="rule same must return one other node for each of its 1 outputs"):
        apply_rules(program, Rewriter(program, "test"), [rule])


def test_an_exception_says_in_which_rule_and_where() -> None:
    program = capture(One(lambda self, x: torch.relu(x)), (X,))
    rule = Rule("broken", pattern=lambda x: ops.relu(x), rewrite=lambda rewriter, found: found["y"])
    with pytest.raises(KeyError) as caught:
        apply_rules(program, Rewriter(program, "test"), [rule])
    (note,) = caught.value.__notes__
    assert note.startswith("in rule broken, at %relu (tests/modules.py:")


def test_a_limit_stops_after_so_many_edits() -> None:
    for limit in range(4):
        program = capture(One(lambda self, x: torch.cos(torch.cos(torch.cos(x)))), (X,))
        rewriter = Rewriter(program, "test", limit=limit)
        apply_rules(program, rewriter, [renaming("cos-to-sin", "cos", aten.sin.default)])
        names = [op_name(node) for node in program.graph.nodes if node.op == "call_function"]
        assert names == ["sin"] * limit + ["cos"] * (3 - limit)
        assert rewriter.exhausted == (limit <= 3)


def test_a_traced_rule_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("SKINK_TRACE_MATCH", "cos-of")
    settings.cache_clear()
    try:
        program = capture(One(lambda self, x: torch.cos(torch.sin(x) * 3.0) + torch.cos(x)), (X,))
        rule = Rule("cos-of-twice-sin", pattern=lambda x: ops.cos(ops.mul(ops.sin(x), 2.0)), rewrite=double)
        with caplog.at_level(logging.WARNING, logger="skink.match"):
            apply_rules(program, Rewriter(program, "test"), [rule, renaming("other", "cos", aten.sin.default)])
    finally:
        monkeypatch.undo()
        settings.cache_clear()
    counted, best = (entry.getMessage() for entry in caplog.records if entry.name == "skink.match")
    assert counted == "cos-of-twice-sin: 0 structural matches"
    assert best.startswith("cos-of-twice-sin: best partial match stops after 4 values at %mul")
    assert best.endswith("2.0 expected, found 3.0")
