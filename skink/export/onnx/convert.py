"""From a prepared step program to an ONNX model, through PyTorch's exporter, under names that people know."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript import optimizer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from skink.errors import ExportError
from skink.export.onnx.prepare import Prepared
from skink.export.onnx.session import KEPT_INPUT
from skink.graph.capture import fake_copy
from skink.graph.program import Program, StateInput
from skink.graph.propagate import dim_text, shape_context
from skink.graph.rewriter import describe

OPSET = 23

# Sizes that stand for symbolic dims while tracing. PyTorch takes one for a constant, and equal sizes for one dim.
_TRACED_SIZES = (3, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)

# How the dims of a step program are called in the ONNX graph.
_DIM_NAMES = {"B": "batch", "T": "sequence", "M": "total", "P": "past", "P+T": "total"}

_LOUD = ("torch.onnx", "onnx_ir", "onnxscript", "torch.onnx._internal.exporter._registration")


def convert(prepared: Prepared) -> ir.Model:
    """The ONNX model. Its weights are read from the program only when it is saved, one at a time.

    Raises:
        ExportError: EXPORT-001 where an operator has no ONNX form.
    """
    program = prepared.program
    with _quiet(), torch.no_grad():
        exported = _export(prepared)
        try:
            converted = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                custom_translation_table=prepared.translations,
                opset_version=OPSET,
                input_names=[*(entry.name for entry in program.inputs), *(entry.name for entry in program.state)],
                output_names=[*program.outputs, *(entry.output_name for entry in program.state)],
                optimize=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise _without_form(error, prepared.source) from error
        if converted is None:
            raise RuntimeError("torch.onnx.export(dynamo=True) returned no program")
        model = converted.model
        weights = dict(model.graph.initializers)
        for value in weights.values():
            # Without values they stay as they are, under their names, while constants among sizes are folded.
            value.const_value = None
        optimizer.optimize_ir(model)
        common.CommonSubexpressionEliminationPass()(model)
        common.ClearMetadataAndDocStringPass()(model)
    _describe_interface(model.graph, prepared)
    _name_nodes(model.graph)
    for name, value in weights.items():
        value.const_value = _lazy_weight(prepared, name)
    for value in model.graph.inputs:
        if value.name == KEPT_INPUT:
            # An input that is an initializer too is one with a default.
            value.const_value = ir.tensor(0, dtype=ir.DataType.INT64, name=KEPT_INPUT)
            model.graph.register_initializer(value)
    model.producer_name, model.producer_version = "skink", ""
    return model


def _export(prepared: Prepared) -> ExportedProgram:
    """The program as `torch.onnx.export` wants it, traced on shapes alone."""
    program = prepared.program
    specs = [(entry.dims, entry.dtype) for entry in program.inputs]
    specs += [(entry.shape, prepared.dtype) for entry in program.state]
    names = dict.fromkeys(dim for dims, _ in specs for dim in dims if isinstance(dim, str))
    sizes = dict(zip(names, _TRACED_SIZES, strict=False))
    dims = {name: torch.export.Dim(name, min=1, max=2**31 - 1) for name in names}
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    module = fake_copy(program.graph_module, mode, None)
    with mode:
        examples = tuple(
            torch.zeros([sizes[dim] if isinstance(dim, str) else dim for dim in shape], dtype=dtype)
            for shape, dtype in specs
        )
    return torch.export.export(
        module,
        examples,
        dynamic_shapes=tuple(
            {axis: dims[dim] for axis, dim in enumerate(shape) if isinstance(dim, str)} for shape, _ in specs
        ),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks to its own authors from the user."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _without_form(error: Exception, source: Program) -> ExportError:
    """EXPORT-001, with the operator and where the model calls it."""
    target, reason = "", ""
    cause: BaseException | None = error
    while cause is not None:
        found = re.search(r"target=torch\.ops\.([\w.]+)\]", str(cause))
        target = found.group(1) if found else target
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        cause = cause.__cause__
    calls = [node for node in source.graph.nodes if node.op == "call_function"]
    node = next((node for node in calls if str(node.target) == target), None)
    if node is None and target:
        # It may be what PyTorch decomposes the model's own operator into: prims.bessel_j0 for aten.special_bessel_j0.
        bare = target.split(".")[1]
        node = next((node for node in calls if bare in str(node.target)), None)
    return ExportError(
        "EXPORT-001",
        f"{(node.target if node is not None else target) or 'a part of the graph'} has no ONNX form.",
        where=describe(node) if node is not None else "",
        why=reason,
        fix="write that line of the model with other operators.",
    )


def _lazy_weight(prepared: Prepared, name: str) -> ir.LazyTensor:
    shape_only = prepared.program.weight(name)
    return ir.LazyTensor(
        lambda: TorchTensor(prepared.weight(name), name=name),
        dtype=TorchTensor(shape_only).dtype,
        shape=ir.Shape(list(shape_only.shape)),
        name=name,
    )


def _describe_interface(graph: ir.Graph, prepared: Prepared) -> None:
    """Names for the dims of inputs and outputs; no shapes in between, where the runtime infers its own."""
    program = prepared.program
    shapes: dict[str, list[int | str]] = {}
    for entry in program.inputs:
        shapes[entry.name] = [_dim_name(dim) for dim in entry.dims]
    for state in program.state:
        shapes[state.name] = [_dim_name(dim) for dim in state.shape]
        shapes[state.output_name] = _present_shape(state)
    names = shape_context(program)
    results = program.graph.output_node().args[0]
    for name, node in zip(program.outputs, results, strict=False):  # type: ignore[arg-type]
        shapes[name] = [_dim_name(dim_text(names, size)) for size in node.meta["val"].shape]
    if any(entry.name == KEPT_INPUT for entry in program.inputs):
        shapes[program.outputs[0]][1] = "kept"
    described = {*graph.inputs, *graph.outputs}
    for value in described:
        value.shape = ir.Shape(shapes[str(value.name)])
    for node in graph:
        for value in node.outputs:
            if value not in described:
                value.shape = None


def _present_shape(state: StateInput) -> list[int | str]:
    shape = [_dim_name(dim) for dim in state.shape]
    if state.growth == "append":
        shape[state.axis] = "total"
    elif state.growth == "ring":
        shape[state.axis] = f"present_{state.limit}"
    return shape


def _dim_name(dim: int | str) -> int | str:
    """`B` → `batch`, `P4` (the past of a ring of four) → `past_4`, expressions as they are."""
    if isinstance(dim, int) or dim.isdigit():
        return int(dim)
    return _DIM_NAMES.get(dim) or re.sub(r"^P(\d+)$", r"past_\1", dim)


def _name_nodes(graph: ir.Graph) -> None:
    """Nodes that read a weight are named after its layer: `/model/layers/0/mlp/up_proj/MatMul`."""
    taken: dict[str, int] = {}
    for index, node in enumerate(graph):
        layer = ""
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer.op_type == "Transpose":
                value = producer.inputs[0]
            if value is not None and value.is_initializer() and "." in str(value.name):
                layer = str(value.name).rpartition(".")[0].replace(".", "/")
                break
        name = f"/{layer}/{node.op_type}" if layer else f"/{node.op_type}_{index}"
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"


def interface(model: ir.Model) -> dict[str, Any]:
    """Names, dtypes and dims of inputs and outputs."""
    return {
        side: {
            str(value.name): {"dtype": str(value.dtype).lower(), "shape": [str(dim) for dim in value.shape or ()]}
            for value in values
        }
        for side, values in (("inputs", model.graph.inputs), ("outputs", model.graph.outputs))
    }
