"""Other ways to a program than a module: a traced `fx.GraphModule`, a graph from dynamo, an `ExportedProgram`.

A traced graph is run node by node under `torch.export`, so that it becomes the same ATen graph as the module it came
from, and its nodes keep the modules and lines that they came from. A graph from dynamo is first made whole: the weights
that dynamo lifted into inputs go back to their qualified names, sizes are read off the inputs, numbers are numbers.
"""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from skink.errors import CaptureError
from skink.graph.capture import Dims, Subject, capture, check_dims, without_writes
from skink.graph.lift import lift
from skink.graph.program import Input, Program, store_weight
from skink.graph.propagate import propagate

# Names of symbolic dims that have none, by axis.
_AXIS_NAMES = ("B", "T", "U", "V")

_FIX_DIMS = "name the axes that vary by dims=, and export or compile with those dynamic."


def program_from_exported(exported: ExportedProgram, *, dims: Dims | None = None) -> Program:
    """An `ExportedProgram` as a program, at stage `captured`.

    Args:
        exported: inputs are tensors; what it writes to in place must be its own intermediate results.
        dims: names of its symbolic dims, as in `capture`; without it axis 0 is `B` and axis 1 is `T`.

    Raises:
        CaptureError: CAPTURE-002 where it remembers something between calls, CAPTURE-005 where inputs or dims do not
            fit.
    """
    exported = without_writes(exported)
    shapes: dict[str, Any] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            node = next(n for n in exported.graph.find_nodes(op="placeholder") if n.name == spec.arg.name)
            shapes[node.name] = node.meta.get("val")
    inputs = _named_inputs(shapes, dims or {})
    subject = Subject(module=nn.Module(), inputs=inputs, prefix="", model=_weights_of(exported))
    program = lift(exported, subject)
    program.origin["class"] = type(exported).__name__
    propagate(program)
    return program


def program_from_dynamo(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, dims: Dims | None = None
) -> Program:
    """The program of a graph that dynamo hands to a backend of `torch.compile`, at stage `captured`.

    Its inputs are the tensors among the graph's inputs that are no weights, by the names of the function's arguments;
    its weights have their qualified names where dynamo knows them. It therefore cannot be what the backend returns,
    which is called with every input of the graph: return `graph_module.forward`.

    Args:
        graph_module: the graph, whose placeholders may be weights, sizes and numbers that dynamo lifted.
        example_inputs: one for each placeholder, as the backend gets them.
        dims: names of its symbolic dims, as in `capture`; without it axis 0 is `B` and axis 1 is `T`.

    Raises:
        CaptureError: CAPTURE-005 where an input is no tensor; otherwise as `capture`.
    """
    check_dims(dims)
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(example_inputs):
        raise CaptureError(
            "CAPTURE-005",
            f"{len(example_inputs)} example inputs for a graph of {len(placeholders)} inputs.",
            fix="pass on what torch.compile gave to the backend.",
        )
    names = _Names([_source(node) for node in placeholders])
    root = nn.Module()
    for name, attribute in graph_module.named_children():
        root.add_module(name, attribute)
    for name, tensor in [*graph_module.named_parameters(recurse=False), *graph_module.named_buffers(recurse=False)]:
        store_weight(root, name, tensor, buffer=not isinstance(tensor, nn.Parameter))

    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    shapes: dict[str, Any] = {}
    examples: dict[str, Tensor] = {}
    later: list[tuple[fx.Node, Any]] = []
    for node, example in zip(placeholders, example_inputs, strict=True):
        known = node.meta.get("example_value", example)
        if isinstance(example, int | torch.SymInt):
            later.append((node, known))
        elif not isinstance(example, Tensor):
            raise _no_tensor(names.of(node), example)
        elif names.is_weight(node) or isinstance(example, nn.Parameter):
            later.append((node, example))
        elif _is_number(node):
            if not re.search(r"\.[A-Za-z_]", _source(node)):
                raise _no_tensor(names.of(node), example.item())
            values[node] = example.item()
        else:
            name = names.of(node)
            values[node] = graph.placeholder(name)
            shapes[name], examples[name] = known, example
    for node, known in later:
        if isinstance(known, Tensor):
            name = names.of(node)
            store_weight(root, name, known, buffer=not isinstance(known, nn.Parameter))
            values[node] = graph.get_attr(name)
        else:
            values[node] = _size_of_input(graph, known, shapes)
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            continue
        reads = node.all_input_nodes
        if node.op == "call_method" and node.target == "item" and isinstance(values[reads[0]], int | float):
            values[node] = values[reads[0]]
            continue
        new = graph.node_copy(node, values.__getitem__)
        new.meta = {key: node.meta[key] for key in ("stack_trace",) if key in node.meta}
        if "nn_module_stack" in node.meta:
            stack = node.meta["nn_module_stack"]
            new.meta["nn_module_stack"] = {key: (names.path(path), kind) for key, (path, kind) in stack.items()}
        values[node] = new
    graph.lint()
    named = {entry.name: dict(enumerate(entry.dims)) for entry in _named_inputs(shapes, dims or {})}
    symbolic = {name: {a: d for a, d in entry.items() if isinstance(d, str)} for name, entry in named.items()}
    # What the exporter finds out would get among dynamo's own findings, which belong to the thread.
    with ThreadPoolExecutor(max_workers=1) as elsewhere:
        return elsewhere.submit(capture, fx.GraphModule(root, graph), examples, dims=symbolic).result()


class Replay(nn.Module):
    """Runs a traced graph node by node, telling the exporter the module that each node came from."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module

    def forward(self, *inputs: Tensor) -> Any:
        """What the graph gives."""
        with fx.traceback.preserve_node_meta():
            return fx.Interpreter(self.graph_module).run(*inputs)


class _Names:
    """Names of dynamo's placeholders, by their sources: `L['self']._modules['up']._parameters['weight']`.

    The variable that holds the module is left out where all weights come from one.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        parts = [_parts(source) for source in sources if _WEIGHT.search(source)]
        self.roots = {part[0] for part in parts if part}
        self.taken: set[str] = set()

    def is_weight(self, node: fx.Node) -> bool:
        """Whether dynamo took it from a module's parameters and buffers."""
        return bool(_WEIGHT.search(_source(node)))

    def of(self, node: fx.Node) -> str:
        """The name of one placeholder: a weight's qualified name, or an argument's."""
        root, *path = _parts(_source(node)) or [node.name]
        if self.is_weight(node):
            whole = ".".join(path if len(self.roots) == 1 else [root, *path])
            choices = [whole] if all(part.isidentifier() or part.isdecimal() for part in whole.split(".")) else []
        else:
            # Of `L['kwargs']['tokens']` the last part, if it will do.
            choices = [name for name in ([root, *path][-1], "_".join([root, *path])) if name.isidentifier()]
        name = next((choice for choice in choices if choice not in self.taken), node.name)
        self.taken.add(name)
        return name

    def path(self, text: str) -> str:
        """A module's qualified name, from dynamo's `L['self'].layers.0`."""
        found = re.fullmatch(r"[LG]\['(\w+)'\]\.?(.*)", text)
        return (found[2] if len(self.roots) <= 1 else f"{found[1]}.{found[2]}") if found else text


_WEIGHT = re.compile(r"\._(parameters|buffers)\[")


def _source(node: fx.Node) -> str:
    return str(getattr(getattr(node, "_dynamo_source", None), "name", ""))


def _parts(source: str) -> list[str]:
    """`["self", "layers", "0", "weight"]` of `L['self']._modules['layers']._modules['0']._parameters['weight']`."""
    found = re.findall(r"\['([^']+)'\]|\[(\d+)\]|\.(?!_modules\b|_parameters\b|_buffers\b)(\w+)", source)
    return [next(filter(None, groups)) for groups in found]


def _is_number(node: fx.Node) -> bool:
    """Whether dynamo made a tensor of a number, to read it back at once."""
    value = node.meta.get("example_value")
    scalar = isinstance(value, Tensor) and value.dim() == 0
    reads = [user.op == "call_method" and user.target == "item" for user in node.users]
    return scalar and bool(reads) and all(reads)


def _size_of_input(graph: fx.Graph, size: Any, shapes: Mapping[str, Any]) -> Any:
    """The size that dynamo lifted: a number, or read off the input that has it."""
    if not _varies(size):
        return int(size)
    for node in graph.find_nodes(op="placeholder"):
        for axis, own in enumerate(shapes[str(node.target)].shape):
            if _varies(own) and own.node.expr == size.node.expr:
                return graph.call_method("size", (node, axis))
    raise CaptureError(
        "CAPTURE-005",
        f"the number {size} is an input of its own, and not the size of a tensor.",
        fix="pass it as a tensor, or fix it with functools.partial.",
    )


def _no_tensor(name: str, value: Any) -> CaptureError:
    return CaptureError(
        "CAPTURE-005",
        f"input {name!r} is of type {type(value).__name__}, not a tensor.",
        fix="make it a tensor, or fix it before the model is exported.",
    )


def _named_inputs(tensors: Mapping[str, Any], dims: Dims) -> tuple[Input, ...]:
    """Inputs with their symbolic dims named: as in `dims`, or by the axis on which a symbol is first seen."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise _no_tensor(name, value)
    unknown = [name for name in dims if name not in tensors]
    if unknown:
        raise CaptureError(
            "CAPTURE-005",
            f"dims are named for {', '.join(unknown)}, which is no input.",
            fix=f"inputs are {', '.join(tensors)}.",
        )
    names: dict[Any, str] = {}
    for name, given in dims.items():
        for axis, dim in given.items():
            rank = tensors[name].dim()
            if not -rank <= axis < rank:
                raise CaptureError(
                    "CAPTURE-005",
                    f"a dim is named for axis {axis} of {name!r}, which has {rank} axes.",
                    fix=f"axes are 0 to {rank - 1}.",
                )
            size = tensors[name].shape[axis]
            if not _varies(size):
                raise CaptureError(
                    "CAPTURE-005",
                    f"axis {axis} of {name!r} is {size} in this graph, and no symbolic dim.",
                    fix=_FIX_DIMS,
                )
            if names.setdefault(size.node.expr, dim) != dim:
                raise CaptureError(
                    "CAPTURE-005",
                    f"axis {axis} of {name!r} is one dim with another, and has two names, {dim} and "
                    f"{names[size.node.expr]}.",
                    fix="give both one name.",
                )
    for name, value in tensors.items():
        for axis, size in enumerate(value.shape):
            if _varies(size) and size.node.expr not in names:
                if not size.node.expr.is_Symbol:
                    raise CaptureError(
                        "CAPTURE-005", f"axis {axis} of {name!r} is {size}, computed from other dims.", fix=_FIX_DIMS
                    )
                name_of_axis = _AXIS_NAMES[min(axis, len(_AXIS_NAMES) - 1)]
                choices = [name_of_axis, *(f"{name_of_axis}{number}" for number in range(2, 100))]
                names[size.node.expr] = next(choice for choice in choices if choice not in names.values())
    return tuple(
        Input(
            name,
            value.dtype,
            tuple(names[size.node.expr] if _varies(size) else int(size) for size in value.shape),
        )
        for name, value in tensors.items()
    )


def _varies(size: Any) -> bool:
    """Whether a size is symbolic still: dynamo may have found that it has one value only."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def _weights_of(exported: ExportedProgram) -> nn.Module:
    """A module that holds an exported program's weights under their names, tied where they were."""
    root = nn.Module()
    first: dict[int, Tensor] = {}
    buffers = {str(spec.target) for spec in exported.graph_signature.input_specs if spec.kind is InputKind.BUFFER}
    # A buffer that is not saved with the model is among the constants.
    tensors = dict(exported.state_dict) | {
        name: exported.constants[name] for name in buffers - set(exported.state_dict)
    }
    for name, tensor in tensors.items():
        store_weight(root, name, tensor, buffer=name in buffers)
        owner_path, _, leaf = name.rpartition(".")
        owner = root.get_submodule(owner_path)
        if id(tensor) in first:
            setattr(owner, leaf, first[id(tensor)])
        else:
            first[id(tensor)] = getattr(owner, leaf)
    return root
