"""A graph's function for training in less memory: what lies inside its regions is computed anew for the backward pass.

Between the regions of skink/graph/regions.py, some two for each layer of a decoder, the fewest values live. They are
all that is kept (Chen et al. 2016, arXiv 1604.06174).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from skink.graph.emit import bind_part
from skink.graph.program import Program
from skink.graph.regions import plan_region, split_regions


def bind_in_regions(program: Program) -> Callable[..., tuple[Any, ...]]:
    """As `skink.graph.emit.bind`, for a tree that says with what each region runs: `tree.run_region(index, run, ...)`.

    Regions are counted from the one before the last, 0, to the first: the last one would be computed anew at once, and
    runs as it is.
    """
    results: list[fx.Node] = []
    fx.map_arg(program.graph.output_node().args[0], results.append)
    regions = split_regions(program, results)
    parts, entries = [], tuple[fx.Node, ...]()
    for region in regions:
        made = tuple(dict.fromkeys((*region.carried, *region.wanted)))
        plan = plan_region(program.graph, made, entries)
        parts.append((bind_part(program, [node for node, _ in plan], entries, made), made, region.carried))
        entries = region.carried

    def run(tree: Any, *inputs: Any) -> tuple[Any, ...]:
        found: dict[fx.Node, Any] = {}
        given: list[Any] = []
        for place, (function, made, carried) in enumerate(parts):
            left = len(parts) - 2 - place
            if left >= 0 and torch.is_grad_enabled():
                values = tree.run_region(left, function, tree, *inputs, *given)
            else:
                values = function(tree, *inputs, *given)
            named = dict(zip(made, values, strict=True))
            given = [named[node] for node in carried]
            found.update((node, value) for node, value in named.items() if node in results)
        return tuple(found[node] for node in results)

    return run
