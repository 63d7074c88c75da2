"""A program in another dtype."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from skink.graph.program import Program, store_weight


def with_dtype(
    program: Program,
    dtype: torch.dtype,
    *,
    shapes_only: bool = False,
    without: Collection[torch.dtype] = (),
    device: str | None = None,
) -> Program:
    """A copy of the program with its trained weights in `dtype`; buffers, such as rotary frequencies, keep theirs.

    Args:
        program: left alone; weights are shared where they fit already.
        dtype: of the trained weights.
        shapes_only: put weights on the meta device, without values.
        without: dtypes that may stand nowhere: buffers of these become `dtype`, casts, constants and inputs float32.
        device: where the weights go.
    """
    clone = program.clone()
    root = nn.Module()
    changed = False
    for name, tensor in program.weights():
        trained = name not in program.buffers or tensor.dtype in without
        wanted = dtype if tensor.is_floating_point() and trained else tensor.dtype
        changed |= wanted is not tensor.dtype
        if shapes_only:
            tensor = torch.empty(tensor.shape, dtype=wanted, device="meta")
        store_weight(root, name, tensor.to(device=device, dtype=wanted), buffer=name in program.buffers)

    def allowed(argument: Any) -> Any:
        nonlocal changed
        if not isinstance(argument, torch.dtype) or argument not in without:
            return argument
        changed = True
        return torch.float32

    if without:
        for node in clone.graph.nodes:
            node.args = map_aggregate(node.args, allowed)
            node.kwargs = map_aggregate(dict(node.kwargs), allowed)
        clone.inputs = tuple(replace(entry, dtype=allowed(entry.dtype)) for entry in clone.inputs)
    clone.graph_module = fx.GraphModule(root, clone.graph)
    # Shapes hold where no dtype changed; otherwise they are propagated when they are asked for.
    if not changed and "shapes" in program.graph_module.meta:
        clone.graph_module.meta["shapes"] = program.graph_module.meta["shapes"]
    return clone
