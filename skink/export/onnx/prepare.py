"""From a step program to a graph for PyTorch's ONNX exporter: our ops made opaque, masks shared, sizes read once.

PyTorch's exporter traces a graph twice more, and would see through our ops into their references. Each op gets a twin
that has a shape and no implementation (opaque.py); the exporter keeps it, and calls the op's `onnx_lowering`.

    attention(q, k, v, padding, causal, window)  →  mask = attention_mask(q, k, padding, causal, window)   once per kind
                                                    attention(q, k, v, mask)
    rotary(x, cos(cat(f, f)), sin(cat(f, f)))    →  rotary_pairs(x, cos(f), sin(f))
    rms_norm(x, weight, eps, offset)             →  rms_norm(x, weight + offset, eps)
    reshape(x, [size(x, 0), size(x, 1), -1])     →  reshape(x, [0, 0, -1])
    norm(x)                                      →  norm(keep_last(x, num_logits_to_keep))      before the head

Weights have shapes only; `Prepared.weight` says what they hold. Exact.
"""

import importlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx

from skink.errors import ExportError, GraphError
from skink.export.onnx import opaque
from skink.export.onnx.opaque import OpaqueOp, Translation
from skink.export.onnx.session import KEPT_INPUT
from skink.graph.dtypes import with_dtype
from skink.graph.last_token import head_input
from skink.graph.pattern import op_name
from skink.graph.program import Input, Program
from skink.graph.propagate import shape_context
from skink.graph.rewriter import Rewriter, describe
from skink.kernels import ATTENTION, RMS_NORM, ROTARY, OpDef, find_op

aten = torch.ops.aten

# ONNX Runtime's CPU kernels do without these: they are exported as float32.
_WIDENED = (torch.bfloat16, torch.float64)

_ELEMENTWISE = (aten.cos.default, aten.sin.default, aten.to.dtype, aten.type_as.default)


@dataclass
class Prepared:
    """A step program ready for PyTorch's exporter.

    Args:
        program: its weights are on the meta device, in the dtypes of the export.
        source: the program that holds the values.
        dtype: of inputs, outputs and trained weights.
        offsets: weights that hold another's values plus a number: {name: (other's name, number)}.
        translations: ONNX lowerings of the opaque ops.
        notes: what the user should know.
    """

    program: Program
    source: Program
    dtype: torch.dtype
    offsets: dict[str, tuple[str, float]] = field(default_factory=dict)
    translations: dict[Any, Translation] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def weight(self, name: str) -> Tensor:
        """The values of one weight, in the dtype of the export; converted at every call and not kept."""
        dtype = self.program.weight(name).dtype
        if name in self.offsets:
            name, offset = self.offsets[name]
            return (self.source.weight(name).to(torch.float32) + offset).to(dtype)
        return self.source.weight(name).detach().to(device="cpu", dtype=dtype).contiguous()


def prepare(stepped: Program) -> Prepared:
    """The program with its ops made opaque; `stepped` is left alone.

    Raises:
        ExportError: EXPORT-001 where an op of ours has no ONNX form.
        GraphError: GRAPH-002 where weights are on the meta device.
    """
    if stepped.is_meta:
        raise GraphError(
            "GRAPH-002",
            "this program's weights are on the meta device: there is nothing to export.",
            fix="load the checkpoint with its weights, then capture again.",
        )
    prepared = _with_shapes_only(stepped)
    program = prepared.program
    shape_context(program)
    rewriter = Rewriter(program, "prepare-onnx")
    _keep_last(prepared, rewriter)
    masks: dict[Any, fx.Node | None] = {}
    pairs: dict[Any, fx.Node | None] = {}
    for node in list(program.graph.nodes):
        definition = find_op(node.target)
        if definition is not None:
            module = _lowering(definition, node)
            with rewriter.before(node):
                if definition is ATTENTION:
                    new = _attention(prepared, rewriter, module, node, masks)
                elif definition is ROTARY:
                    new = _rotary(prepared, rewriter, module, node, pairs)
                elif definition is RMS_NORM:
                    new = _rms_norm(prepared, rewriter, module, node)
                else:
                    new = _twin(prepared, rewriter, module, definition, node.args, node.kwargs)
            rewriter.replace(node, new, rule="opaque")
        elif op_name(node) == "reshape":
            _reshape(prepared, rewriter, node)
    rewriter.finish()
    return prepared


def export_dtype(program: Program) -> torch.dtype:
    """The dtype that a program is exported in: its own, or float32 where ONNX Runtime's CPU kernels lack its own."""
    return torch.float32 if program.dtype in _WIDENED else program.dtype


def cast_program(program: Program, dtype: torch.dtype, *, shapes_only: bool = False) -> Program:
    """The program with its trained weights in `dtype`, and nothing in a dtype that is not exported.

    With `shapes_only` its weights are on the meta device; otherwise on the CPU, and shared where they fit already.
    """
    device = None if shapes_only else "cpu"
    return with_dtype(program, dtype, shapes_only=shapes_only, without=_WIDENED, device=device)


def _with_shapes_only(stepped: Program) -> Prepared:
    dtype = export_dtype(stepped)
    prepared = Prepared(cast_program(stepped, dtype, shapes_only=True), source=stepped, dtype=dtype)
    if dtype is not stepped.dtype:
        name = str(stepped.dtype).removeprefix("torch.")
        prepared.notes.append(f"exported as float32: ONNX Runtime's CPU kernels do not compute in {name}.")
    return prepared


def _lowering(definition: OpDef, node: fx.Node) -> ModuleType:
    """The op's `onnx_lowering` module, which stands beside its reference."""
    name = definition.reference.__module__.rpartition(".")[0] + ".onnx_lowering"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ExportError(
            "EXPORT-001",
            f"skink.{definition.name} has no ONNX form.",
            where=describe(node),
            fix="leave out the pass that made it, or add an onnx_lowering.py beside the op.",
        ) from error


def _call(prepared: Prepared, rewriter: Rewriter, op: OpaqueOp, translation: Translation, *args: Any) -> fx.Node:
    prepared.translations[op.target] = translation
    return rewriter.call(op.target, *args)


def _twin(
    prepared: Prepared, rewriter: Rewriter, module: ModuleType, definition: OpDef, args: Any, kwargs: Any
) -> fx.Node:
    """The op as an opaque one with its own schema."""
    target = OpaqueOp(definition.schema, definition.fake).target
    prepared.translations[target] = getattr(module, definition.name)
    return rewriter.call(target, *args, **kwargs)


def _attention(
    prepared: Prepared, rewriter: Rewriter, module: ModuleType, node: fx.Node, masks: dict[Any, fx.Node | None]
) -> fx.Node:
    arguments = ATTENTION.bind(node.args, node.kwargs)
    query, key, padding = arguments["query"], arguments["key"], arguments["key_mask"]
    causal, window = arguments["causal"], arguments["window"]
    lengths = tuple(_size(entry.meta["val"].shape[2]) for entry in (query, key))
    kind = (padding, causal, window, *lengths)
    if kind not in masks:
        masks[kind] = None
        if causal or window or padding is not None:
            mask = (query, key, padding, causal, window)
            masks[kind] = _call(prepared, rewriter, opaque.ATTENTION_MASK, module.attention_mask, *mask)
    rest = (arguments["value"], masks[kind], *(arguments[name] for name in ("scale", "softcap", "sinks", "alibi")))
    return _call(prepared, rewriter, opaque.ATTENTION, module.attention, query, key, *rest)


def _rotary(
    prepared: Prepared, rewriter: Rewriter, module: ModuleType, node: fx.Node, pairs: dict[Any, fx.Node | None]
) -> fx.Node:
    arguments = ROTARY.bind(node.args, node.kwargs)
    cos, sin, interleaved = arguments["cos"], arguments["sin"], arguments["interleaved"]
    tables = [_angle_of_pairs(rewriter, table, interleaved, pairs) for table in (cos, sin)]
    if None in tables:
        return _twin(prepared, rewriter, module, ROTARY, node.args, node.kwargs)
    rest = (*tables, interleaved, cos.meta["val"].shape[-1])
    return _call(prepared, rewriter, opaque.ROTARY_PAIRS, module.rotary_pairs, arguments["input"], *rest)


def _angle_of_pairs(
    rewriter: Rewriter, table: Any, interleaved: bool, pairs: dict[Any, fx.Node | None]
) -> fx.Node | None:
    """The table with one entry for each pair of features, or None where its entries are not known to repeat."""
    kind = (table, interleaved)
    if kind not in pairs:
        pairs[kind] = None
        if op_name(table) == "cat" and not interleaved:
            parts, axis = table.args[0], table.args[1] if len(table.args) > 1 else 0
            if len(parts) == 2 and parts[0] is parts[1] and axis in (-1, table.meta["val"].dim() - 1):
                pairs[kind] = parts[0]
        elif op_name(table) == "repeat_interleave" and interleaved:
            source, repeats, axis = (*table.args, *table.kwargs.values())[:3]
            if repeats == 2 and axis in (-1, table.meta["val"].dim() - 1):
                pairs[kind] = source
        elif table.op == "call_function" and (
            table.target in _ELEMENTWISE or (op_name(table) == "mul" and not isinstance(table.args[1], fx.Node))
        ):
            below = _angle_of_pairs(rewriter, table.args[0], interleaved, pairs)
            if below is not None:
                with rewriter.before(table):
                    pairs[kind] = rewriter.call(table.target, below, *table.args[1:], **table.kwargs)
    return pairs[kind]


def _rms_norm(prepared: Prepared, rewriter: Rewriter, module: ModuleType, node: fx.Node) -> fx.Node:
    arguments = RMS_NORM.bind(node.args, node.kwargs)
    weight, offset = arguments["weight"], arguments["offset"]
    if offset and weight is not None and weight.op == "get_attr":
        source = str(weight.target)
        name = f"{source}_plus_" + f"{offset:g}".replace(".", "_")
        prepared.offsets[name] = (source, offset)
        stored = prepared.program.weight(source)
        weight, offset = rewriter.weight(name, torch.empty_like(stored, device="meta")), 0.0
    return _twin(prepared, rewriter, module, RMS_NORM, (arguments["input"], weight, arguments["eps"], offset), {})


def _reshape(prepared: Prepared, rewriter: Rewriter, node: fx.Node) -> None:
    """Write a reshape to numbers, sizes of its input in their places, and one more, without reading any size."""
    source: Any = node.args[0]
    before = [_size(size) for size in source.meta["val"].shape]
    after = [_size(size) for size in node.meta["val"].shape]
    if 0 in after:
        return
    sizes = [
        size if isinstance(size, int) else 0 if before[axis : axis + 1] == [size] else -1
        for axis, size in enumerate(after)
    ]
    if sizes.count(-1) > 1:
        return
    with rewriter.before(node):
        new = _call(prepared, rewriter, opaque.RESHAPE, opaque.translate_reshape, source, sizes)
    rewriter.replace(node, new, rule="sizes-to-numbers")


def _keep_last(prepared: Prepared, rewriter: Rewriter) -> None:
    """Let the caller have the logits of the last tokens only: a prompt's others cost much and are rarely wanted."""
    program = prepared.program
    if not program.state or program.outputs != ("logits",):
        return
    cut = head_input(program)
    if cut is program.graph.output_node().args[0][0]:  # type: ignore[index]
        return
    graph = program.graph
    with graph.inserting_after(graph.find_nodes(op="placeholder")[len(program.inputs) - 1]):
        count = graph.placeholder(KEPT_INPUT)
    entry = Input(KEPT_INPUT, torch.int64, ())
    count.meta["val"] = shape_context(program).fake_input(entry.dims, entry.dtype)
    program.inputs = (*program.inputs, entry)
    (head,) = cut.users
    with rewriter.before(head):
        kept = _call(prepared, rewriter, opaque.KEEP_LAST, opaque.translate_keep_last, cut, count)
    rewriter.replace(cut, kept, rule="keep-last")


def _size(size: Any) -> Any:
    """A size that can be compared: a number, or an expression over the program's dims."""
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)
