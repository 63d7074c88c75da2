"""Make `skink::low_rank_linear` of two thin linear layers, where that is how they run best.

linear(linear(x, down), up, bias)   ->   skink.low_rank_linear(x, down, up, bias)
                                         linear(x, up @ down, bias)

forms.py says which form is taken.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from skink.graph.emit import linear_owner
from skink.graph.pattern import Call, Match, NoMatch, Rule, Weight, ops
from skink.graph.program import Program
from skink.graph.rewriter import Rewriter, describe
from skink.kernels import LOW_RANK_LINEAR
from skink.kernels.low_rank_linear.break_even import Form
from skink.passes.lower.forms import Decision, Target, choose_form, is_linear

aten = torch.ops.aten

FUSE = "fuse-low-rank"
MULTIPLY = "multiply-low-rank-out"


@dataclass
class ThinPairs:
    """The rules for pairs of thin layers in one program, and what they decided about each, by its second layer."""

    program: Program
    target: Target
    decisions: dict[fx.Node, Decision] = field(default_factory=dict)

    def rules(self) -> list[Rule]:
        """Rules that fuse a pair, or multiply it out."""
        return [
            rule
            for pattern in (_pair, _pair_with_bias)
            for rule in (
                Rule(FUSE, pattern=pattern, check=self._check("fused"), rewrite=self._fuse, exclusive=True),
                Rule(MULTIPLY, pattern=pattern, check=self._check("dense"), rewrite=_multiply, exclusive=True),
            )
        ]

    def _check(self, form: Form) -> Callable[[Match], NoMatch | None]:
        """A rule's check: whether a match is a pair, and `form` is how it should run."""

        def check(found: Match) -> NoMatch | None:
            reason = self._no_pair(found)
            if reason is not None:
                return NoMatch(reason, found.root)
            if found.root not in self.decisions:
                _, down, up, bias = _operands(found)
                factors = {"down": down, "up": up, "bias": bias}
                self.decisions[found.root] = choose_form(
                    describe(found.root), LOW_RANK_LINEAR, factors, self.program, self.target, pivoted=False
                )
            chosen = self.decisions[found.root].form
            return None if chosen == form else NoMatch(f"runs better as {chosen}", found.root)

        return check

    def _fuse(self, rewriter: Rewriter, found: Match) -> fx.Node:
        """One op in the place of a pair."""
        x, down, up, bias = _operands(found)
        node = rewriter.call(LOW_RANK_LINEAR.overload, x, down, up, *([] if bias is None else [bias]), rule=FUSE)
        node.meta["refused"] = self.decisions[found.root].refused
        # So that a layer which PEFT or a user swaps for another is the one that runs: see emit.py.
        owners = tuple(
            linear_owner(rewriter.program, linear) for linear in (*found.root.all_input_nodes[:1], found.root)
        )
        if None not in owners:
            node.meta["layers"] = owners
        return node

    def _no_pair(self, found: Match) -> str | None:
        if not is_linear(found.root.args[0]):
            return "a cast lies between the products"
        x, down, up, bias = _operands(found)
        stored = [node for node in (down, up, bias) if node is not None]
        if any(node.op != "get_attr" for node in stored):
            return "a factor is not read as it is stored"
        if len({node.meta["val"].dtype for node in (found.root, x, *stored)}) > 1:
            return "the pair has more than one dtype"
        if down.meta["val"].shape[0] >= min(down.meta["val"].shape[1], up.meta["val"].shape[0]):
            return "the product is not of low rank"
        if any(node.name in self.target.keep for node in found.nodes):
            return "a node of the pair is asked for"
        return None


def _operands(found: Match) -> tuple[Any, ...]:
    """Input, down, up and bias, as the two layers read them."""
    inner: Any = found.root.args[0]
    return inner.args[0], inner.args[1], found.root.args[1], (found.root.args[2:3] or (None,))[0]


def _pair(x: Tensor, down: Weight, up: Weight) -> Call:
    return ops.linear(ops.linear(x, down), up)


def _pair_with_bias(x: Tensor, down: Weight, up: Weight, bias: Weight) -> Call:
    return ops.linear(ops.linear(x, down), up, bias)


def _multiply(rewriter: Rewriter, found: Match) -> fx.Node:
    x, down, up, bias = _operands(found)
    factors = [rewriter.program.weight(node.target) for node in (up, down)]
    wide = torch.promote_types(factors[0].dtype, torch.float32)
    product = (factors[0].to(wide) @ factors[1].to(wide)).to(factors[0].dtype)
    weight = rewriter.weight(f"{up.target}_times_down", product)
    return rewriter.call(aten.linear.default, x, weight, *([] if bias is None else [bias]), rule=MULTIPLY)
