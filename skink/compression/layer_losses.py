"""What each edited layer adds to the loss by itself: the measured side of "predicted beside measured".

For each layer that a recipe factored, the dense model is measured with that one weight replaced by what its factors
amount to. Their sum is not what all of them add at once: that is measured too, by the perplexity of the result.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from skink.graph.passes import LayerRecord
from skink.graph.program import Program
from skink.graph.progress import silent
from skink.passes.decompose.selection import LinearLayer, linear_layers

Score = Callable[[Program], float]


def layer_losses(
    dense: Program,
    program: Program,
    records: Iterable[LayerRecord],
    score: Score,
    *,
    progress: Callable[[int, int], None] = silent,
) -> dict[str, float]:
    """What each layer alone adds to the loss, by the layer's name, in the unit of `score`.

    Left out are layers that were kept dense, and those whose edit leaves no matrix of the old shape.

    Args:
        dense: the model before the recipe's passes, canonical.
        program: the same after them, from the same capture.
        records: what the passes did.
        score: the loss of a program; called once for `dense`, and once for each layer.
        progress: called as (done, total) after each.
    """
    layers = {layer.name: layer for layer in linear_layers(dense)}
    replaced = {}
    for record in records:
        layer = layers.get(record.name)
        weight = effective_weight(dense, program, layer) if layer is not None else None
        if layer is not None and weight is not None:
            replaced[layer] = weight
    if not replaced:
        return {}
    base = score(dense)
    progress(1, len(replaced) + 1)
    losses = {}
    for index, (layer, weight) in enumerate(replaced.items()):
        alone = dense.clone()
        alone.set_weight(layer.weight, weight, buffer=layer.weight in dense.buffers)
        losses[layer.name] = score(alone) - base
        progress(index + 2, len(replaced) + 1)
    return losses


def effective_weight(dense: Program, program: Program, layer: LinearLayer) -> Tensor | None:
    """The matrix [out, in] that `program` multiplies a layer's inputs by, or None where it still has the dense weight.

    What stands in the layer's place is run on the rows of the identity, whatever it is made of: two factors or three, a
    factor shared with other layers, rows made of other rows. Also None where that gives no matrix of the layer's shape.

    Args:
        dense: has the layer.
        program: has what stands in its place; nodes that no edit touched have their names of `dense`.
        layer: of `dense`.
    """
    source = layer.readers[0].args[0]
    if not isinstance(source, fx.Node):
        return None
    in_features = layer.shape[1]
    like = dense.weight(layer.weight)
    rows = torch.eye(in_features, dtype=like.dtype, device=like.device)[None]
    for node in _instead(program, layer):
        try:
            with torch.no_grad():
                # Less its value at zero, that is without the bias.
                moved = _run(program, node, {source.name: rows}) - _run(
                    program, node, {source.name: torch.zeros_like(rows)}
                )
        except _NotOfTheLayerError:
            continue
        if moved.shape != (1, in_features, layer.shape[0]):
            return None
        weight: Tensor = moved[0].mT.contiguous()
        return weight
    return None


class _NotOfTheLayerError(Exception):
    """A value that depends on something else than the layer's input."""


def _instead(program: Program, layer: LinearLayer) -> list[fx.Node]:
    """What may stand in a layer's place, the likeliest first; nothing where the layer's own weight is still read.

    That is what those read now who read the layer, and, where they were replaced too, what reads weights named below
    the layer: the last of them, unless other layers share a factor of this one's and read it later.
    """
    own = (f"{layer.name}.", f"{layer.weight}_factored.")
    by_name: dict[str, fx.Node] = {}
    readers = []
    for node in program.graph.nodes:
        by_name[node.name] = node
        names = [str(entry.target) for entry in node.all_input_nodes if entry.op == "get_attr"]
        if layer.weight in names:
            return []
        if any(name.startswith(own) for name in names):
            readers.append(node)
    found = []
    for user in layer.readers[0].users:
        other = by_name.get(user.name)
        if other is not None and other.target is user.target:
            for before, now in zip(user.args, other.args, strict=False):
                if before is layer.readers[0] and isinstance(now, fx.Node):
                    found.append(now)
    return [*found, *reversed(readers)]


def _run(program: Program, node: fx.Node, known: dict[str, Any]) -> Any:
    """The value of a node from the values known by name, and stored weights."""
    pending = [node]
    while pending:
        here = pending[-1]
        missing = [entry for entry in here.all_input_nodes if entry.name not in known]
        if here.name in known:
            pending.pop()
        elif here.op == "get_attr":
            known[here.name] = program.weight(str(here.target))
        elif here.op != "call_function" or not callable(here.target):
            raise _NotOfTheLayerError
        elif missing:
            pending += missing
        else:
            args, kwargs = fx.map_arg((here.args, here.kwargs), lambda entry: known[entry.name])
            known[here.name] = here.target(*args, **kwargs)
    return known[node.name]
