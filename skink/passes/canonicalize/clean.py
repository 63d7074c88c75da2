"""Remove what the exporter leaves behind: sizes read many times, calls that do nothing, the same call twice.

Exact: every rewrite here keeps every number.
"""

from typing import Any

import torch
from torch import fx

from skink.graph.pattern import op_name
from skink.graph.program import Program
from skink.graph.propagate import ShapeContext, evaluate, expression, shape_context
from skink.graph.rewriter import Rewriter

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten.to.device, aten.type_as.default, aten._to_copy.default)


def clean(program: Program, rewriter: Rewriter) -> None:
    """Run every clean-up but `drop_casts` until none finds anything."""
    _name_sizes(program, rewriter)
    while True:
        before = rewriter.count
        _drop_calls_that_do_nothing(program, rewriter)
        _drop_empty_parts(program, rewriter)
        _merge_equal_calls(program, rewriter)
        rewriter.sweep()
        if rewriter.count == before:
            break


def _name_sizes(program: Program, rewriter: Rewriter) -> None:
    """One node for each symbolic dim, read off the first input that has it, and numbers for sizes that are known.

    Which input matters: once the program is stepped, the mask is longer than the tokens, though both had T before.
    """
    context = shape_context(program)
    anchor = next(node for node in program.graph.nodes if node.op != "placeholder")
    inputs = list(zip(program.inputs, program.graph.find_nodes(op="placeholder"), strict=False))
    canonical: dict[Any, fx.Node] = {}
    for symbol, name in context.names.items():
        found = next(((entry, node) for entry, node in inputs if name in entry.dims), None)
        if found is None:
            continue  # a dim of the state alone
        entry, placeholder = found
        arguments = (placeholder, entry.dims.index(name))
        present = (node for node in placeholder.users if node.target is aten.sym_size.int and node.args == arguments)
        known = next(present, None)
        if known is None:
            with rewriter.before(anchor):
                known = rewriter.call(aten.sym_size.int, *arguments)
        elif known is anchor:
            anchor = anchor.next
        else:
            rewriter.move_before(known, anchor)
        canonical[symbol] = known
    for node in list(program.graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, int | torch.SymInt) or node in canonical.values():
            continue
        if isinstance(value, int):
            rewriter.replace(node, value, rule="size-to-number")
            continue
        same = canonical.setdefault(value.node.expr, node)
        if same is not node:
            rewriter.replace(node, same, rule="size-once")


def _same_shape(one: Any, other: Any) -> bool:
    return len(one.shape) == len(other.shape) and all(
        expression(a) == expression(b) for a, b in zip(one.shape, other.shape, strict=True)
    )


def _identity_of(node: fx.Node) -> fx.Node | None:
    """The argument that `node` returns unchanged, if it does."""
    name = op_name(node)
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if source is None or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    value, input_value = node.meta["val"], source.meta.get("val")
    if not isinstance(input_value, torch.Tensor):
        return None
    if name in ("alias", "detach", "contiguous", "clone", "lift_fresh_copy", "view_as"):
        return source if _same_shape(value, input_value) else None
    if name in ("dropout", "native_dropout", "feature_dropout"):
        return source if node.args[1] == 0 or node.args[2] is False else None
    if name in ("slice", "expand", "reshape"):
        return source if _same_shape(value, input_value) else None
    if name in ("mul", "div") and not node.kwargs and node.args[1] == 1 and value.dtype == input_value.dtype:
        return source
    return None


def _drop_calls_that_do_nothing(program: Program, rewriter: Rewriter) -> None:
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    for node in calls:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            # A view that may copy: then no `contiguous` before it is needed.
            rewriter.update(node, target=aten.reshape.default, rule="view-to-reshape")
        elif node.target is aten.copy.default and _same_shape(node.meta["val"], node.args[1].meta["val"]):
            # What an assignment to a slice leaves; it has no derivative, and a cast has.
            rewriter.update(node, target=aten.type_as.default, args=(node.args[1], node.args[0]), rule="copy-to-cast")
    for node in calls:
        source = _identity_of(node)
        if source is not None:
            rewriter.replace(node, source, rule="drop-identity")


def _drop_empty_parts(program: Program, rewriter: Rewriter) -> None:
    """`cat` without its empty parts; of one part, the part itself."""
    for node in list(program.graph.nodes):
        if node.target is not aten.cat.default:
            continue
        parts = list(node.args[0])
        axis = node.args[1] if len(node.args) > 1 else 0
        shapes = [part.meta["val"].shape for part in parts]
        # PyTorch also lets a part of one axis, of size 0, stand beside parts of more.
        sizes = [shape[axis if len(shape) > 1 else 0] for shape in shapes]
        kept = [part for part, size in zip(parts, sizes, strict=True) if expression(size) != 0]
        if len(kept) == 1:
            rewriter.replace(node, kept[0], rule="cat-of-one")
        elif kept and len(kept) < len(parts):
            rewriter.update(node, args=(kept, *node.args[1:]), rule="cat-without-empty")


def _merge_equal_calls(program: Program, rewriter: Rewriter) -> None:
    seen: dict[Any, fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.op == "get_attr":
            key: Any = ("weight", node.target)
        elif node.op == "call_function" and not node.is_impure():
            key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        else:
            continue
        first = seen.setdefault(key, node)
        if first is not node:
            rewriter.replace(node, first, rule="merge-equal")


def _frozen(argument: Any) -> Any:
    if isinstance(argument, list | tuple):
        return tuple(_frozen(entry) for entry in argument)
    if isinstance(argument, dict):
        return tuple(sorted((key, _frozen(value)) for key, value in argument.items()))
    # True == 1 == 1.0 and 0.0 == -0.0 in Python, and not in a graph.
    return argument if isinstance(argument, fx.Node) else (type(argument), repr(argument))


def drop_casts(program: Program, rewriter: Rewriter) -> None:
    """Remove casts that change no dtype, whatever dtype the weights have.

    In a program whose casts follow its weights, dtypes are judged with weights in bfloat16: what changes no dtype there
    changes none in float32 either, while the reverse does not hold. A cast that goes changes no dtype, so one look is
    enough for all.
    """
    if program.any_dtype:
        values = evaluate(program, ShapeContext(program), weights_as=torch.bfloat16)
    else:
        values = {node: node.meta["val"] for node in program.graph.nodes}
    for node in list(program.graph.nodes):
        if node.target in _CASTS and values[node].dtype == values[node.args[0]].dtype:
            rewriter.replace(node, node.args[0], rule="drop-cast")
    rewriter.sweep()
