"""Put thin linear layers in the place of a dense one, y = x W^T + b.

| factors | y                                              | where                                                  |
| two     | (x down^T) up^T + b                            | down: [R, in], up: [out, R]                            |
| three   | ((x down^T) core^T) up^T + b                   | down: [R_in, in], core: [R_out, R_in], up: [out, R_out] |
| pivoted | [z, z rest^T + b'][order], z = x kept^T + b_kept | kept: [R, in], rest: [out - R, R], `factorize.pivoted` |
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, fx

from skink.graph.passes import LayerRecord
from skink.graph.program import Program
from skink.graph.rewriter import Rewriter
from skink.passes.decompose.factorize.pivoted import Pivoted
from skink.passes.decompose.selection import LinearLayer

aten = torch.ops.aten

RULE = "linear-to-low-rank"

_NAMES = ("down.weight", "core.weight", "up.weight", "up.bias", "kept.weight", "kept.bias", "rest.weight", "rest.bias")


def replace_by_factors(
    program: Program,
    rewriter: Rewriter,
    layer: LinearLayer,
    up: Tensor,
    down: Tensor | str,
    *,
    core: Tensor | None = None,
    rule: str = RULE,
    detail: str = "",
) -> bool:
    """Put two linear layers, or three, in the place of every reader of a weight: one edit for each reader.

    The bias goes to `up`. Factors are named below the layer: `q_proj.down.weight`, `q_proj.core.weight`,
    `q_proj.up.weight`, `q_proj.up.bias`. The dense weight is dropped at once.

    Args:
        program: what is edited.
        rewriter: edits it.
        layer: which weight.
        up: [out, R_out], in the weight's dtype.
        down: [R_in, in], likewise; or the name of a weight that the program has already, to share it.
        core: [R_out, R_in]; None: two factors with R_out = R_in.
        rule: name of the edit.
        detail: what the edit's log says about it.

    Returns:
        False where the rewriter's limit refused an edit; the dense weight is then still read.
    """
    is_buffer = layer.weight in program.buffers
    prefix = free_prefix(program, layer.weight)
    with rewriter.before(layer.readers[0]):
        thin = [
            rewriter.weight(down)
            if isinstance(down, str)
            else rewriter.weight(f"{prefix}down.weight", down, buffer=is_buffer)
        ]
        if core is not None:
            thin.append(rewriter.weight(f"{prefix}core.weight", core, buffer=is_buffer))
        last = rewriter.weight(f"{prefix}up.weight", up, buffer=is_buffer)
        bias = _moved_bias(program, rewriter, layer, prefix)
    done = True
    for node in layer.readers:
        with rewriter.before(node):
            inner = node.args[0]
            for factor in thin:
                inner = rewriter.call(node.target, inner, factor, rule=rule)
            outer = rewriter.call(node.target, inner, last, *_bias(node, bias), rule=rule)
        done = rewriter.replace(node, outer, rule=rule, detail=detail) and done
        rewriter.erase_dead(node)
    # The dense weight goes at once, so that its memory is free before the next one is factored.
    program.drop_unused_weights()
    return done


def replace_by_shared_input(
    program: Program,
    rewriter: Rewriter,
    layers: Sequence[LinearLayer],
    ups: Sequence[Tensor],
    down: Tensor,
    *,
    rule: str = RULE,
    detail: str = "",
) -> bool:
    """Put one thin layer, and one after it for each of `layers`, in the place of layers that read one activation.

    `down` is named below the first layer. Each layer has one reader, and all read the same node; one edit.

    Args:
        program: what is edited.
        rewriter: edits it.
        layers: in the graph's order.
        ups: [out_i, R] of each, in the weights' dtype.
        down: [R, in], likewise.
        rule: name of the edit.
        detail: what the edit's log says about it.

    Returns:
        False where the rewriter's limit refused the edit; the dense weights are then still read.
    """
    nodes = [layer.readers[0] for layer in layers]
    prefix = free_prefix(program, layers[0].weight)
    replacements: dict[fx.Node, fx.Node | int] = {}
    with rewriter.before(nodes[0]):
        thin = rewriter.weight(f"{prefix}down.weight", down, buffer=layers[0].weight in program.buffers)
        inner = rewriter.call(nodes[0].target, nodes[0].args[0], thin, rule=rule)
    for layer, node, up in zip(layers, nodes, ups, strict=True):
        prefix = free_prefix(program, layer.weight, f"{prefix}down.weight" if layer is layers[0] else "")
        with rewriter.before(node):
            last = rewriter.weight(f"{prefix}up.weight", up, buffer=layer.weight in program.buffers)
            bias = _moved_bias(program, rewriter, layer, prefix)
            replacements[node] = rewriter.call(node.target, inner, last, *_bias(node, bias), rule=rule)
    done = rewriter.replace_all(replacements, rule=rule, detail=detail)
    for node in nodes:
        rewriter.erase_dead(node)
    program.drop_unused_weights()
    return done


def replace_by_pivots(
    program: Program,
    rewriter: Rewriter,
    layers: Sequence[LinearLayer],
    form: Pivoted,
    *,
    rule: str = RULE,
    detail: str = "",
) -> bool:
    """Put the rows that are kept, and the rest made of them, in the place of one layer or of several stacked ones.

    Named below the first layer: `q_proj.kept.weight`, `q_proj.rest.weight` and their biases, and `q_proj.order`,
    int64[out]: where each output is. Of several layers each reads its slice. Layers' own biases go into the two; others
    are added behind.

    Args:
        program: what is edited.
        rewriter: edits it.
        layers: in the graph's order; several have one reader each, of the same node.
        form: of their weights, one above the other, in the weights' dtype.
        rule: name of the edit, one for each reader of the first layer.
        detail: what the edit's log says about it.

    Returns:
        False where the rewriter's limit refused an edit; the dense weights are then still read.
    """
    is_buffer = layers[0].weight in program.buffers
    prefix = free_prefix(program, layers[0].weight)
    ends = list(accumulate(layer.shape[0] for layer in layers))
    biases = [_own_bias(program, layer) for layer in layers]
    with rewriter.before(layers[0].readers[0]):
        factors = []
        bias = None
        if any(own is not None for own in biases):
            dtype = form.kept.dtype
            whole = torch.cat(
                [form.kept.new_zeros(layer.shape[0]) if own is None else own for layer, own in zip(layers, biases)]
            ).double()
            part = whole[form.pivots]
            bias = (part.to(dtype), (whole[form.others] - form.rest.double() @ part).to(dtype))
        for index, (name, weight) in enumerate((("kept", form.kept), ("rest", form.rest))):
            stored = [rewriter.weight(f"{prefix}{name}.weight", weight, buffer=is_buffer)]
            if bias is not None:
                stored.append(rewriter.weight(f"{prefix}{name}.bias", bias[index], buffer=is_buffer))
            factors.append(stored)
        order = rewriter.weight(f"{prefix}order", form.order, buffer=True)
    done = True
    for nodes in zip(*(layer.readers for layer in layers), strict=True):
        replacements: dict[fx.Node, fx.Node | int] = {}
        with rewriter.before(nodes[0]):
            kept = rewriter.call(nodes[0].target, nodes[0].args[0], *factors[0], rule=rule)
            rest = rewriter.call(nodes[0].target, kept, *factors[1], rule=rule)
            both = rewriter.call(aten.cat.default, [kept, rest], -1, rule=rule)
            rows = rewriter.call(aten.index_select.default, both, -1, order, rule=rule)
        for node, end, layer, own in zip(nodes, ends, layers, biases, strict=True):
            with rewriter.before(node):
                result = rows
                if len(layers) > 1:
                    result = rewriter.call(aten.slice.Tensor, rows, -1, end - layer.shape[0], end, rule=rule)
                if own is None and _bias(node, None):
                    result = rewriter.call(aten.add.Tensor, result, *_bias(node, None), rule=rule)
            replacements[node] = result
        done = rewriter.replace_all(replacements, rule=rule, detail=detail) and done
        for node in nodes:
            rewriter.erase_dead(node)
    program.drop_unused_weights()
    return done


def factored(
    layer: LinearLayer,
    rank: int,
    parameters: int,
    *,
    predicted_error: float | None = None,
    weight_error: float | None = None,
    baseline_error: float | None = None,
    predicted_loss: float | None = None,
) -> LayerRecord:
    """The record of a layer that was replaced; `parameters` of all its factors, errors as of `LayerRecord`."""
    return LayerRecord(
        name=layer.name,
        kind="linear",
        shape=layer.shape,
        decision="factored",
        parameters_before=layer.parameters,
        parameters_after=parameters,
        rank=rank,
        predicted_error=predicted_error,
        weight_error=weight_error,
        baseline_error=baseline_error,
        predicted_loss=predicted_loss,
    )


def free_prefix(program: Program, weight: str, *own: str) -> str:
    """Where the factors go: below the layer, `q_proj.` for `q_proj.weight`, unless names there are taken.

    Names of `own` are the caller's, and not in the way.
    """
    owner, _, leaf = weight.rpartition(".")
    prefix = (f"{owner}." if owner else "") if leaf == "weight" else f"{weight}_factored."
    taken = {name for name, _ in program.weights()} - set(own)
    while taken & {f"{prefix}{name}" for name in (*_NAMES, "order")}:
        prefix = f"{prefix.removesuffix('.')}_factored."
    return prefix


def _moved_bias(program: Program, rewriter: Rewriter, layer: LinearLayer, prefix: str) -> fx.Node | None:
    """The layer's own bias as one of `up`, where it is read by nothing else."""
    own = _own_bias(program, layer)
    if own is None:
        return None
    name = layer.weight.removesuffix("weight") + "bias"
    return rewriter.weight(f"{prefix}up.bias", own, buffer=name in program.buffers)


def _bias(node: fx.Node, moved: fx.Node | None) -> tuple[fx.Node, ...]:
    """The bias argument of what replaces `node`, if any."""
    bias = moved if moved is not None else (node.args[2] if len(node.args) > 2 else None)
    return (bias,) if isinstance(bias, fx.Node) else ()


def _own_bias(program: Program, layer: LinearLayer) -> Tensor | None:
    """The layer's own bias, where every reader adds it and nothing else reads it."""
    name = layer.weight.removesuffix("weight") + "bias"
    biases = {node.args[2] if len(node.args) > 2 else None for node in layer.readers}
    bias = next(iter(biases))
    own = (
        len(biases) == 1
        and isinstance(bias, fx.Node)
        and bias.op == "get_attr"
        and bias.target == name
        and set(bias.users) <= set(layer.readers)
    )
    return program.weight(name) if own else None
