"""Random sets of exact rules on random programs never change the numbers, and leave nothing to do."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from skink.errors import RewriteError
from skink.graph.driver import apply_rules
from skink.graph.pattern import Match, Rule, Weight, any_of, ops
from skink.graph.program import Program
from skink.graph.rewriter import Rewriter
from skink.graph.verifier import check_structure
from tests.graph.random_programs import example_inputs, programs

aten = torch.ops.aten
ADD, SUB, MUL, NEG = aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.neg.default


def sum_of_products(x: Tensor, w: Weight, v: Weight) -> Any:
    return ops.add(ops.linear(x, w), ops.linear(x, v))


def quarter_turns(rewriter: Rewriter, found: Match) -> list[fx.Node]:
    """sin(x) = cos(x - pi/2) and cos(x) = sin(x + pi/2)."""
    earlier, later = (rewriter.call(op, found["x"], torch.pi / 2) for op in (SUB, ADD))
    return [rewriter.call(aten.cos.default, earlier), rewriter.call(aten.sin.default, later)]


def distribute(rewriter: Rewriter, found: Match) -> fx.Node:
    return rewriter.call(ADD, *(rewriter.call(MUL, found[name], found["z"]) for name in "xy"))


def factor_out(rewriter: Rewriter, found: Match) -> fx.Node:
    return rewriter.call(MUL, rewriter.call(ADD, found["x"], found["y"]), found["z"])


# Some of them undo each other: sets that hold both must be named as a cycle, or end.
RULES: tuple[Rule, ...] = (
    Rule("neg-of-neg", lambda x: ops.neg(ops.neg(x)), lambda r, m: m["x"]),
    Rule("relu-of-relu", lambda x: ops.relu(ops.relu(x)), lambda r, m: r.call(aten.relu.default, m["x"])),
    Rule("even", lambda x: ops.cos(any_of(ops.neg(x), ops.abs(x))), lambda r, m: r.call(aten.cos.default, m["x"])),
    Rule("odd", lambda x: ops.sin(ops.neg(x)), lambda r, m: r.call(NEG, r.call(aten.sin.default, m["x"]))),
    Rule("odd-back", lambda x: ops.neg(ops.sin(x)), lambda r, m: r.call(aten.sin.default, r.call(NEG, m["x"]))),
    Rule("times-one", lambda x: ops.mul(x, 1), lambda r, m: m["x"]),
    Rule("twice", lambda x: ops.add(x, x), lambda r, m: r.call(MUL, m["x"], 2)),
    Rule("twice-back", lambda x: ops.mul(x, 2), lambda r, m: r.call(ADD, m["x"], m["x"])),
    Rule("two-negatives", lambda x, y: ops.mul(ops.neg(x), ops.neg(y)), lambda r, m: r.call(MUL, m["x"], m["y"])),
    Rule("difference", lambda x, y: ops.sub(ops.neg(x), ops.neg(y)), lambda r, m: r.call(SUB, m["y"], m["x"])),
    Rule("distribute", lambda x, y, z: ops.mul(ops.add(x, y), z), distribute),
    Rule("factor-out", lambda x, y, z: ops.add(ops.mul(x, z), ops.mul(y, z)), factor_out, exclusive=True),
    Rule(
        "sum-of-products",
        sum_of_products,
        lambda r, m: r.call(aten.linear.default, m["x"], r.call(ADD, m["w"], m["v"])),
    ),
    Rule("turn", lambda x: (ops.sin(x), ops.cos(x)), quarter_turns),
)


@settings(deadline=None, max_examples=80)
@given(program=programs(), rules=st.permutations(RULES), count=st.integers(1, len(RULES)))
def test_exact_rules_never_change_the_numbers(program: Program, rules: list[Rule], count: int) -> None:
    inputs = example_inputs()
    wanted = [entry.clone() for entry in program(*inputs)]
    rewriter = Rewriter(program, "random")
    names = {rule.name for rule in rules[:count]}
    try:
        apply_rules(program, rewriter, rules[:count])
    except RewriteError:
        undo_each_other = [{"odd", "odd-back"}, {"twice", "twice-back"}, {"distribute", "factor-out"}]
        assert any(pair <= names for pair in undo_each_other)
        rewriter.finish()
    else:
        assert {edit.rule for edit in program.edits} <= names
        again = Rewriter(program, "again")
        apply_rules(program, again, rules[:count])
        assert again.count == 0
    check_structure(program, pass_name="random")
    for found, expected in zip(program(*inputs), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(program=programs(), rules=st.permutations(RULES[:8]), limit=st.integers(0, 6))
def test_nor_does_any_number_of_first_edits(program: Program, rules: list[Rule], limit: int) -> None:
    inputs = example_inputs()
    wanted = [entry.clone() for entry in program(*inputs)]
    chosen = [rule for rule in rules if not rule.name.endswith("-back")]
    apply_rules(program, Rewriter(program, "random", limit=limit), chosen)
    assert len(program.edits) <= limit
    for found, expected in zip(program(*inputs), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_rules_are_tried_at_all() -> None:
    """A fuzzer whose programs never match anything would prove nothing."""
    seen: set[str] = set()

    @settings(deadline=None, max_examples=60, derandomize=True, database=None)
    @given(program=programs(least=12, most=24))
    def run(program: Program) -> None:
        for rule in RULES:
            clone = program.clone()
            rewriter = Rewriter(clone, "random", limit=1)
            apply_rules(clone, rewriter, [rule])
            seen.update(edit.rule for edit in clone.edits)

    run()
    assert len(seen) >= len(RULES) - 3
