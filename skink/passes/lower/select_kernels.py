"""Bind every `skink::` op to a kernel: the last step before a program runs, and the only one that knows devices.

Factored linear layers become one op each first, where that is quicker (fuse_low_rank.py, fuse_pivoted.py).

For each op its kernels are asked in order of preference; the first that serves the call is bound, and every refusal is
kept with its reason. The reference serves whatever no kernel does, so a program always runs.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from skink.graph.driver import apply_rules
from skink.graph.program import Program, Stage
from skink.graph.propagate import ShapeContext, evaluate, refresh
from skink.graph.rewriter import Rewriter, describe
from skink.kernels import OpCall, find_op
from skink.kernels.pivoted_linear.columns import index_select
from skink.passes.lower.forms import Decision, Target, is_linear
from skink.passes.lower.fuse_low_rank import ThinPairs
from skink.passes.lower.fuse_pivoted import PivotedPairs

_log = logging.getLogger("skink.lower")


@dataclass(frozen=True)
class Choice:
    """Which kernel one node was bound to, and why not the ones before it: (kernel, reason).

    For `low_rank_linear` and `pivoted_linear` the kernel may also be `products`, the layers as they were, or `dense`,
    their product.
    """

    node: str
    op: str
    kernel: str
    refused: tuple[tuple[str, str], ...]


def lower(
    program: Program,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    training: bool = False,
    dense: bool = False,
    keep: Sequence[fx.Node] = (),
) -> tuple[Program, tuple[Choice, ...]]:
    """The program with kernels bound, at stage `lowered`, and the choices made.

    Args:
        program: at any stage but `lowered`; left alone.
        device: where it will run.
        dtype: what the trained weights will be in; their present dtype by default.
        training: bind only kernels that gradients flow through.
        dense: allow factored layers to be multiplied out where that is quicker, at the cost of memory.
        keep: nodes of `program` that must be there, by their names, in the result.
    """
    lowered = program.clone()
    place = torch.device(device)
    names = frozenset(node.name for node in keep)
    pairs = _fuse(lowered, Target(place, dtype, training, dense, names))
    values: dict[fx.Node, Any]
    if dtype is None or dtype is program.dtype:
        refresh(lowered)
        values = {node: node.meta["val"] for node in lowered.graph.nodes if "val" in node.meta}
    else:
        values = evaluate(lowered, ShapeContext(lowered), weights_as=dtype)
    choices = [_bind(node, values, place, training) for node in lowered.graph.nodes if find_op(node.target) is not None]
    # Columns of pivoted layers that were not fused.
    for node in lowered.graph.find_nodes(op="call_function", target=torch.ops.aten.index_select.default):
        node.target = index_select
    # A fused pair is chosen about like any op; the others are no ops.
    choices += [Choice(pair.node, pair.op, pair.form, pair.refused) for pair in pairs if pair.form != "fused"]
    lowered.stage = Stage.LOWERED
    lowered.graph_module.recompile()
    return lowered, tuple(choices)


def _fuse(program: Program, target: Target) -> tuple[Decision, ...]:
    """Decide about every factored layer of `program`, and rewrite it."""
    if not any(is_linear(node) and is_linear(node.args[0]) for node in program.graph.nodes):
        return ()
    refresh(program)
    thin, pivoted = ThinPairs(program, target), PivotedPairs(program, target)
    apply_rules(program, Rewriter(program, "lower"), [*thin.rules(), *pivoted.rules()])
    decisions = (*thin.decisions.values(), *pivoted.decisions.values())
    for decision in decisions:
        _log.debug("%s: %s, %s", decision.node, decision.form, decision.refused)
    return decisions


def _bind(node: fx.Node, values: dict[fx.Node, Any], device: torch.device, training: bool) -> Choice:
    op = find_op(node.target)
    if op is None:
        raise TypeError(f"{describe(node)} is no op of Skink's")
    arguments = op.bind(node.args, node.kwargs)
    call = OpCall(fx.map_arg(arguments, values.__getitem__), device)
    variant, refused = op.choose(call, training=training)
    refused = node.meta.get("refused", refused)
    # The verifier asks for it: in a lowered program every op has its kernel.
    node.meta["kernel"] = variant.name if variant is not None else "reference"
    if variant is None:
        return Choice(describe(node), op.name, "reference", refused)
    node.target = variant.load()
    return Choice(describe(node), op.name, variant.name, refused)
