"""Bind every `skink::` op to a kernel: the last step before a program runs, and the only one that knows devices.

For each op its kernels are asked in order of preference; the first that serves the call is bound, and every refusal is
kept with its reason. The reference serves whatever no kernel does, so a program always runs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from skink.graph.program import Program, Stage
from skink.graph.propagate import ShapeContext, evaluate, refresh
from skink.graph.rewriter import describe
from skink.kernels import OpCall, find_op


@dataclass(frozen=True)
class Choice:
    """Which kernel one node was bound to, and why not the ones before it: (kernel, reason)."""

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
) -> tuple[Program, tuple[Choice, ...]]:
    """The program with kernels bound, at stage `lowered`, and the choices made.

    Args:
        program: at any stage but `lowered`; left alone.
        device: where it will run.
        dtype: what the trained weights will be in; their present dtype by default.
        training: bind only kernels that gradients flow through.
    """
    lowered = program.clone()
    values: dict[fx.Node, Any]
    if dtype is None or dtype is program.dtype:
        refresh(lowered)
        values = {node: node.meta["val"] for node in lowered.graph.nodes if "val" in node.meta}
    else:
        values = evaluate(lowered, ShapeContext(lowered), weights_as=dtype)
    choices = [
        _bind(node, values, torch.device(device), training)
        for node in lowered.graph.nodes
        if find_op(node.target) is not None
    ]
    lowered.stage = Stage.LOWERED
    lowered.graph_module.recompile()
    return lowered, tuple(choices)


def _bind(node: fx.Node, values: dict[fx.Node, Any], device: torch.device, training: bool) -> Choice:
    op = find_op(node.target)
    if op is None:
        raise TypeError(f"{describe(node)} is no op of Skink's")
    arguments = op.bind(node.args, node.kwargs)
    call = OpCall(fx.map_arg(arguments, values.__getitem__), device)
    variant, refused = op.choose(call, training=training)
    # The verifier asks for it: in a lowered program every op has its kernel.
    node.meta["kernel"] = variant.name if variant is not None else "reference"
    if variant is None:
        return Choice(describe(node), op.name, "reference", refused)
    node.target = variant.load()
    return Choice(describe(node), op.name, variant.name, refused)
