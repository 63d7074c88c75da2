"""Rules that join layout changes: raised ops put some of them around themselves, which undo those that the model has.

    permute(permute(x))     →  permute(x), transpose(x) or x
    reshape(flatten(x))     →  reshape(x)

Exact.
"""

from typing import Any

import torch
from torch import fx

from skink.graph.pattern import Call, Match, Rule, op_name, ops
from skink.graph.rewriter import Rewriter

aten = torch.ops.aten
_TURNS = ("transpose", "permute")


def _axes(node: fx.Node) -> list[int]:
    """For each axis of a transpose's result, the axis that it was."""
    dims = node.meta["val"].dim()
    numbers: Any = node.args[1] if op_name(node) == "permute" else node.args[1:3]
    numbers = [axis % dims for axis in numbers]
    if op_name(node) == "permute":
        return list(numbers)
    axes = list(range(dims))
    axes[numbers[0]], axes[numbers[1]] = numbers[1], numbers[0]
    return axes


def _join_turns(rewriter: Rewriter, found: Match) -> fx.Node:
    outer = _axes(found.root)
    inner = _axes(next(node for node in found.nodes if node is not found.root and op_name(node) in _TURNS))
    axes = [inner[axis] for axis in outer]
    x: fx.Node = found["x"]
    moved = [place for place, axis in enumerate(axes) if place != axis]
    if len(moved) == 2:
        return rewriter.call(aten.transpose.int, x, *moved, rule="join-transposes")
    return rewriter.call(aten.permute.default, x, axes, rule="join-transposes") if moved else x


def _join_folds(rewriter: Rewriter, found: Match) -> fx.Node:
    return rewriter.call(aten.reshape.default, found["x"], found["shape"], rule="join-reshapes")


def _turned_twice(x: fx.Node) -> Call:
    return ops.any_of(*_TURNS)(ops.any_of(*_TURNS)(x, ...), ...)


def _folded_twice(x: fx.Node, shape: Any) -> Call:
    return ops.reshape(ops.flatten(x, ...), shape)


RULES: tuple[Rule, ...] = (
    Rule("join-transposes", pattern=_turned_twice, rewrite=_join_turns),
    Rule("join-reshapes", pattern=_folded_twice, rewrite=_join_folds),
)
