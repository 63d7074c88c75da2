"""Make `skink::pivoted_linear` of a linear layer, another that reads its results, and what puts both in order.

both = cat([z, linear(z, rest, b')], -1), z = linear(x, kept, b)   ->   skink.pivoted_linear(x, kept, rest, b, b')
index_select(both, -1, order)                                      ->   skink.pivoted_linear(..., order)
                                                                        linear(x, [kept; rest @ kept][order], ...)

The order is fused where one reader takes all that it wants of `both`; several keep their own. forms.py says which form
is taken.
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
from skink.kernels import PIVOTED_LINEAR
from skink.kernels.low_rank_linear.break_even import Form
from skink.passes.lower.forms import Decision, Target, choose_form, is_linear

aten = torch.ops.aten

FUSE = "fuse-pivoted"
MULTIPLY = "multiply-pivoted-out"


@dataclass(frozen=True)
class _Layers:
    """The nodes of one match; `order` and biases where there are some."""

    x: fx.Node
    first: fx.Node
    second: fx.Node
    both: fx.Node
    order: fx.Node | None

    @property
    def operands(self) -> dict[str, fx.Node | None]:
        """What is stored, by the op's names."""
        biases: list[Any] = [(node.args[2:3] or (None,))[0] for node in (self.first, self.second)]
        kept: Any = self.first.args[1]
        rest: Any = self.second.args[1]
        return {"kept": kept, "rest": rest, "kept_bias": biases[0], "rest_bias": biases[1], "order": self.order}


@dataclass
class PivotedPairs:
    """The rules for pivoted layers in one program, and what they decided about each, by its last node."""

    program: Program
    target: Target
    decisions: dict[fx.Node, Decision] = field(default_factory=dict)

    def rules(self) -> list[Rule]:
        """Rules that fuse such layers, or multiply them out."""
        return [
            rule
            for pattern in (_ordered, _unordered)
            for rule in (
                Rule(FUSE, pattern=pattern, check=self._check("fused"), rewrite=self._fuse, exclusive=True),
                Rule(MULTIPLY, pattern=pattern, check=self._check("dense"), rewrite=_multiply, exclusive=True),
            )
        ]

    def _check(self, form: Form) -> Callable[[Match], NoMatch | None]:
        """A rule's check: whether a match is of this kind, and `form` is how it should run."""

        def check(found: Match) -> NoMatch | None:
            layers = _layers(found)
            reason = "a cast lies between the layers" if layers is None else self._refuses(found, layers)
            if reason is not None or layers is None:
                return NoMatch(str(reason), found.root)
            if found.root not in self.decisions:
                self.decisions[found.root] = choose_form(
                    describe(found.root), PIVOTED_LINEAR, layers.operands, self.program, self.target, pivoted=True
                )
            chosen = self.decisions[found.root].form
            return None if chosen == form else NoMatch(f"runs better as {chosen}", found.root)

        return check

    def _refuses(self, found: Match, layers: _Layers) -> str | None:
        operands = layers.operands
        stored = [node for node in operands.values() if node is not None]
        if any(node.op != "get_attr" for node in stored):
            return "a factor, a bias or the order is not read as it is stored"
        floating = [node for name, node in operands.items() if node is not None and name != "order"]
        if len({node.meta["val"].dtype for node in (found.root, layers.x, *floating)}) > 1:
            return "the layers have more than one dtype"
        if not all(_on_last_axis(node) for node in {layers.both, found.root}):
            return "results are joined or chosen along another axis"
        if layers.order is not None and layers.order.meta["val"].dtype != torch.int64:
            return "the order is not of int64"
        rank, in_ = layers.first.args[1].meta["val"].shape  # type: ignore[union-attr]
        if rank >= in_:
            return "the product is not of low rank"
        if any(node.name in self.target.keep for node in found.nodes):
            return "a node of the layers is asked for"
        if layers.order is None and self._is_ordered(layers.both):
            return "the order behind it belongs to the layer"
        return None

    def _is_ordered(self, both: fx.Node) -> bool:
        """Whether the other pattern matches at the one reader of `both`."""
        if len(both.users) > 1:
            return False
        reader = next(iter(both.users))
        order: Any = reader.args[2] if reader.target is aten.index_select.default else None
        return (
            isinstance(order, fx.Node)
            and order.op == "get_attr"
            and order.meta["val"].dtype == torch.int64
            and _on_last_axis(reader)
            and reader.name not in self.target.keep
        )

    def _fuse(self, rewriter: Rewriter, found: Match) -> fx.Node:
        """One op in the place of the layers."""
        layers: Any = _layers(found)
        operands = list(layers.operands.values())
        while operands[-1] is None:
            operands.pop()
        node = rewriter.call(PIVOTED_LINEAR.overload, layers.x, *operands, rule=FUSE)
        node.meta["refused"] = self.decisions[found.root].refused
        # So that a layer which PEFT or a user swaps for another is the one that runs: see emit.py.
        owners = tuple(linear_owner(rewriter.program, layer) for layer in (layers.first, layers.second))
        if None not in owners:
            node.meta["pivoted_layers"] = owners
        return node


def _layers(found: Match) -> _Layers | None:
    """The nodes of a match; None where a cast lies between them."""
    root = found.root
    is_ordered = root.target is aten.index_select.default
    both: Any = root.args[0] if is_ordered else root
    order: Any = root.args[2] if is_ordered else None
    if both.target is not aten.cat.default:
        return None
    first, second = both.args[0]
    if not (is_linear(first) and is_linear(second) and second.args[0] is first):
        return None
    return _Layers(first.args[0], first, second, both, order)


def _on_last_axis(node: fx.Node) -> bool:
    """Of a `cat` or an `index_select`: whether its axis is the last one."""
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    dims = node.meta["val"].dim()
    return isinstance(axis, int) and axis % dims == dims - 1


def _unordered(x: Tensor, kept: Weight, rest: Weight) -> Call:
    z = ops.linear(x, kept, ...)
    return ops.cat([z, ops.linear(z, rest, ...)], ...)


def _ordered(x: Tensor, kept: Weight, rest: Weight, axis: int, order: Weight) -> Call:
    return ops.index_select(_unordered(x, kept, rest), axis, order)


def _multiply(rewriter: Rewriter, found: Match) -> fx.Node:
    layers: Any = _layers(found)
    read = {name: rewriter.program.weight(node.target) for name, node in layers.operands.items() if node is not None}
    wide = torch.promote_types(read["kept"].dtype, torch.float32)

    def whole(kept: Tensor, others: Tensor) -> Tensor:
        both = torch.cat([kept, others])
        return (both[read["order"]] if "order" in read else both).to(read["kept"].dtype)

    kept, rest = read["kept"].to(wide), read["rest"].to(wide)
    biases = [
        read[name].to(wide) if name in read else kept.new_zeros(size)
        for name, size in (("kept_bias", len(kept)), ("rest_bias", len(rest)))
    ]
    prefix = layers.operands["kept"].target
    operands = [rewriter.weight(f"{prefix}_multiplied_out", whole(kept, rest @ kept))]
    if {"kept_bias", "rest_bias"} & read.keys():
        bias = whole(biases[0], rest @ biases[0] + biases[1])
        operands.append(rewriter.weight(f"{prefix}_multiplied_out_bias", bias))
    return rewriter.call(aten.linear.default, layers.x, *operands, rule=MULTIPLY)
