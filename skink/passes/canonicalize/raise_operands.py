"""Queries, keys and values as `attention` takes them, [B, H, T, D], found below what a model does to its own for a
product: transposes, heads folded into the batch, factors, and heads repeated for the queries that share them.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from skink.graph.pattern import below_widening, op_name, through_float_casts
from skink.graph.propagate import expression
from skink.graph.rewriter import Rewriter
from skink.kernels import ROTARY
from skink.passes.canonicalize.raise_scores import number

aten = torch.ops.aten


@dataclass(frozen=True)
class Again:
    """A call to be made again on another first argument."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Operand:
    """A tensor of [B, H, T, D], and how to come by it.

    Args:
        node: where it is found.
        turned: its last two axes are the other way round there.
        heads: H where it is [B*H, T, D] there (1 where there are no heads at all); 0 where it is [B, H, T, D].
        again: calls that are still to be made on the node, where what it was before its heads were repeated was found
            below them.
        unrepeated_shape: its shape then.
    """

    node: fx.Node
    turned: bool = False
    heads: int = 0
    again: tuple[Again, ...] = ()
    unrepeated_shape: tuple[Any, ...] = ()

    @property
    def shape(self) -> tuple[Any, ...]:
        """As expressions: B, H, T, D."""
        if self.unrepeated_shape:
            return self.unrepeated_shape
        sizes = list(map(expression, self.node.meta["val"].shape))
        if self.turned:
            sizes[-2:] = sizes[:-3:-1]
        if self.heads:
            batch = sizes[0] // self.heads if isinstance(sizes[0], int) else sizes[0] / self.heads
            sizes[:1] = [batch, self.heads]
        return tuple(sizes)

    def build(self, rewriter: Rewriter) -> fx.Node:
        """The tensor itself."""
        node = self.node
        if self.heads:
            node = rewriter.call(aten.unflatten.int, node, 0, [-1, self.heads])
        for call in self.again:
            node = rewriter.call(call.target, node, *call.args, **call.kwargs)
        return rewriter.call(aten.transpose.int, node, -1, -2) if self.turned else node


def operand_of(node: Any, *, turned: bool, heads: int) -> Operand:
    """Look through transposes and reshapes that only fold heads into the batch.

    Args:
        node: as the product reads it.
        turned: whether its last two axes are the other way round.
        heads: how many are folded into the batch where it has three axes.
    """
    while True:
        name, dims = op_name(node), node.meta["val"].dim()
        source = node.args[0] if node.op == "call_function" and node.args else None
        if name == "transpose" and {axis % dims for axis in node.args[1:3]} == {dims - 2, dims - 1} and turned:
            node, turned = source, False
        elif turned and (below := _turned_below(node)) is not None:
            node = below
        elif name == "permute" and dims == 4 and turned and [axis % 4 for axis in node.args[1]] == [0, 1, 3, 2]:
            node, turned = source, False
        elif name == "reshape" and dims == 3 and source is not None and _folds(source, node):
            node = source
        else:
            return Operand(below_widening(node), turned, heads if dims == 3 else 0)


def _turned_below(node: fx.Node) -> fx.Node | None:
    """What changes the order of axes below casts that lose nothing."""
    below: fx.Node = through_float_casts(node)
    return below if below is not node and op_name(below) in ("transpose", "permute", "reshape") else None


def _folds(source: fx.Node, node: fx.Node) -> bool:
    before, after = _shape(source), _shape(node)
    return len(before) == 4 and before[2:] == after[1:] and before[0] * before[1] == after[0]


def without_factors(node: fx.Node, *, turned: bool, heads: int) -> tuple[Operand, float]:
    """A query or key before it was multiplied by numbers, and their product."""
    factor = 1.0
    while True:
        operand = operand_of(node, turned=turned, heads=heads)
        node, times = _without_factor(operand.node)
        if node is operand.node:
            return operand, factor
        turned, factor = operand.turned, factor * times


def _without_factor(node: fx.Node) -> tuple[fx.Node, float]:
    divides = op_name(node) == "div"
    if op_name(node) not in ("mul", "div") or node.kwargs:
        return node, 1.0
    factor = number(node.args[1])
    source: Any = node.args[0]
    if not factor or node.meta["val"].dtype != source.meta["val"].dtype:
        return node, 1.0
    return source, 1.0 / factor if divides else factor


def unrepeated(operand: Operand) -> Operand:
    """The keys or values before each of their heads was repeated for the queries that share it; else as they are.

    Repeated heads may have been turned by `rotary` and transposed since; so will be those that are not repeated.
    """
    if operand.turned or operand.heads or operand.node.meta["val"].dim() != 4:
        return operand
    node: Any = operand.node
    axis = 1
    above: list[Again] = []
    while True:
        node = through_float_casts(node)
        if node.target is ROTARY.overload and axis == 1:
            above.insert(0, Again(node.target, node.args[1:], dict(node.kwargs)))
        elif _swaps_heads_and_tokens(node):
            above.insert(0, Again(node.target, node.args[1:], {}))
            axis = 3 - axis
        else:
            break
        node = node.args[0]
    found = _before_repeating(node, axis)
    if found is None:
        return operand
    source, calls, heads = found
    shape = (operand.shape[0], heads, *operand.shape[2:])
    return replace(operand, node=source, again=(*calls, *above), unrepeated_shape=shape)


def _swaps_heads_and_tokens(node: Any) -> bool:
    if op_name(node) == "permute":
        return [axis % 4 for axis in node.args[1]] == [0, 2, 1, 3]
    return op_name(node) == "transpose" and {axis % 4 for axis in node.args[1:3]} == {1, 2}


def _before_repeating(node: Any, axis: int) -> tuple[fx.Node, tuple[Again, ...], int] | None:
    """(what was repeated along `axis`, calls that make four axes of it, its heads) where `node` does nothing else."""
    times = node.args[1] if op_name(node) == "repeat_interleave" and len(node.args) > 1 else None
    # A tensor could repeat each head as often as it likes.
    if isinstance(times, int) and node.args[2:3] in ((axis,), (axis - 4,)):
        source = node.args[0]
        return source, (), int(source.meta["val"].shape[axis])
    if op_name(node) != "reshape" or op_name(node.args[0]) != "expand":
        return None
    wide: Any = node.args[0].args[0]
    before, between, after = _shape(wide), _shape(node.args[0]), _shape(node)
    if len(before) != 5 or len(between) != 5 or before[axis + 1] != 1 or not isinstance(before[axis], int):
        return None
    joined = [*between[:axis], between[axis] * between[axis + 1], *between[axis + 2 :]]
    if joined != after or [*before[: axis + 1], *before[axis + 2 :]] != [*between[: axis + 1], *between[axis + 2 :]]:
        return None
    if op_name(wide) == "unsqueeze" and wide.args[1] in (axis + 1, axis - 4):
        return wide.args[0], (), before[axis]
    return wide, (Again(aten.squeeze.dim, (axis + 1,), {}),), before[axis]


def _shape(node: fx.Node) -> list[Any]:
    return list(map(expression, node.meta["val"].shape))
