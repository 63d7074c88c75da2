"""Program ↔ JSON: the graph without its weights, as plain data.

Nothing in a file is ever executed or imported: operators are looked up by name in the allow-list of operators.py, and
every other name in it is checked (file_checks.py), since names go into the code that runs the graph. A file is refused,
or gives a program that is well formed; whether its shapes fit together is found out when they are propagated.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from skink.errors import GraphError
from skink.graph.file_checks import (
    DEEPEST,
    LARGEST,
    RESERVED,
    as_keyword,
    as_list,
    as_text,
    as_weight_name,
    check_arguments,
    is_name,
    require,
    unique_keys,
)
from skink.graph.operators import find_operator, operator_name
from skink.graph.program import Input, Program, Stage, StateInput, store_weight

FORMAT = 1

# What building a graph from damaged data can raise.
_DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)}  # fmt: skip
_FORMATS = {str(entry).removeprefix("torch."): entry for entry in (
    torch.contiguous_format, torch.preserve_format, torch.channels_last,
)}  # fmt: skip


def program_to_json(program: Program) -> dict[str, Any]:
    """The program without its weights, as JSON values. Deterministic."""
    nodes = []
    for node in program.graph.nodes:
        if node.op == "get_attr":
            continue
        entry: dict[str, Any] = {"name": node.name, "op": node.op}
        if node.op == "call_function":
            entry |= {
                "target": operator_name(node.target),
                "args": _encode(node.args),
                "kwargs": _encode(dict(node.kwargs)),
            }
            entry |= {key: node.meta[key] for key in ("module", "source", "rule") if key in node.meta}
        elif node.op == "placeholder":
            entry["target"] = node.target
        else:
            entry["args"] = _encode(node.args)
        nodes.append(entry)
    return {
        "format": FORMAT,
        "stage": str(program.stage),
        "inputs": [_input_to_json(entry) for entry in program.inputs],
        "outputs": list(program.outputs),
        "state": [vars(entry) | {"shape": list(entry.shape)} for entry in program.state],
        "buffers": sorted(program.buffers),
        "aliases": dict(sorted(program.aliases.items())),
        "any_dtype": program.any_dtype,
        "origin": program.origin,
        "weights": {
            as_weight_name(name): {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in sorted(program.weights())
        },
        "nodes": nodes,
    }


def program_from_json(data: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> Program:
    """A program from `program_to_json`'s values.

    Args:
        data: the JSON values.
        weights: by name; those missing become meta tensors of the recorded shape.

    Raises:
        GraphError: GRAPH-001 where anything is missing, unknown, or not allowed.
    """
    try:
        return _decode_program(data, weights or {})
    except _DAMAGE as error:
        raise GraphError(
            "GRAPH-001",
            "this is not a graph that Skink wrote, or it was damaged.",
            why=f"{type(error).__name__}: {error}",
            fix="write the folder again with skink compress.",
        ) from error


def load_graph(text: str, weights: Mapping[str, Tensor] | None = None) -> Program:
    """A program from JSON text; raises as `program_from_json`."""
    try:
        data = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise GraphError(
            "GRAPH-001", "the graph is not JSON.", why=str(error), fix="write the folder again with skink compress."
        ) from error
    if not isinstance(data, dict):
        raise GraphError("GRAPH-001", f"the graph is a JSON {type(data).__name__}, not an object.")
    return program_from_json(data, weights)


def _decode_program(data: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Program:
    if type(data["format"]) is not int or data["format"] != FORMAT:
        raise GraphError(
            "GRAPH-001",
            f"the graph is of format {data['format']!r}; this Skink reads format {FORMAT}.",
            fix="update skink, or write the folder again.",
        )
    buffers = frozenset(as_text(name) for name in as_list(data["buffers"]))
    root = _decode_weights(data["weights"], buffers, weights)
    aliases = {as_weight_name(alias): name for alias, name in data["aliases"].items()}
    require(set(aliases.values()) <= set(data["weights"]), "a weight is tied to one that is not listed")
    require(not set(aliases) & set(data["weights"]), "a weight that is listed is tied to another")
    require(buffers <= set(data["weights"]), "a buffer is no weight")
    inputs = tuple(
        Input(as_text(entry["name"]), _DTYPES[entry["dtype"]], _decode_dims(entry["dims"]))
        for entry in as_list(data["inputs"])
    )
    state = tuple(_decode_state(entry) for entry in as_list(data["state"]))
    outputs = tuple(as_text(name) for name in as_list(data["outputs"]))
    for names in ([entry.name for entry in inputs], [entry.name for entry in state], outputs):
        require(len(set(names)) == len(names), "two inputs or outputs have one name")
    require(isinstance(data["any_dtype"], bool) and isinstance(data["origin"], dict), "a field has another type")
    graph = _decode_nodes(data["nodes"], data["weights"])
    placeholders = graph.find_nodes(op="placeholder")
    require(len(placeholders) == len(inputs) + len(state), "placeholders and inputs differ in number")
    require(len(graph.output_node().args[0]) == len(outputs) + len(state), "results and outputs differ in number")  # type: ignore[arg-type]
    return Program(
        graph_module=fx.GraphModule(root, graph),
        inputs=inputs,
        outputs=outputs,
        buffers=buffers,
        aliases=aliases,
        any_dtype=data["any_dtype"],
        stage={str(stage): stage for stage in Stage}[data["stage"]],
        state=state,
        origin=dict(data["origin"]),
    )


def _decode_weights(listed: Mapping[str, Any], buffers: frozenset[str], weights: Mapping[str, Tensor]) -> nn.Module:
    root = nn.Module()
    for name, described in listed.items():
        shape = [size for size in _decode_dims(described["shape"]) if isinstance(size, int)]
        require(len(shape) == len(described["shape"]), "a weight has a symbolic dim")
        tensor = weights.get(name)
        if tensor is None:
            tensor = torch.empty(shape, dtype=_DTYPES[described["dtype"]], device="meta")
        elif list(tensor.shape) != shape:
            raise GraphError(
                "GRAPH-001",
                f"the weight {name!r} has shape {list(tensor.shape)}, and the graph was written for {shape}.",
                fix="weights and graph belong to different models; write the folder again with skink compress.",
            )
        store_weight(root, as_weight_name(name), tensor, buffer=name in buffers)
    return root


def _decode_dims(dims: Sequence[Any]) -> tuple[int | str, ...]:
    for dim in as_list(dims):
        known = is_name(dim) if isinstance(dim, str) else type(dim) is int and 0 <= dim <= LARGEST
        require(known, f"{dim!r} is not a dim")
    return tuple(dims)


def _decode_state(entry: Mapping[str, Any]) -> StateInput:
    state = StateInput(**{**entry, "shape": _decode_dims(entry["shape"])})
    require(state.growth in ("append", "ring", "fixed"), f"{state.growth!r} is no kind of state")
    numbers = (state.layer, state.axis, state.limit)
    require(all(type(n) is int and 0 <= n <= LARGEST for n in numbers), "a number of the state is out of range")
    require(state.axis < len(state.shape), "a state has no such axis")
    as_text(state.name)
    return state


def _decode_nodes(entries: Sequence[Mapping[str, Any]], weights: Mapping[str, Any]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    readers: dict[str, fx.Node] = {}

    def weight(name: str) -> fx.Node:
        if name not in weights:
            raise GraphError("GRAPH-001", f"the graph reads a weight {name!r} that it does not list.")
        if name not in readers:
            readers[name] = graph.get_attr(name)
        return readers[name]

    for entry in as_list(entries):
        name, kind = entry["name"], entry["op"]
        require(is_name(name) and name not in nodes, f"{name!r} is not a node's name, or there are two")
        require("output" not in nodes, "something follows the output")
        if kind == "placeholder":
            target = entry["target"]
            require(is_name(target) and target not in RESERVED, f"{target!r} is not an input's name")
            node = graph.create_node("placeholder", target, name=name)
        elif kind == "call_function":
            function = find_operator(entry["target"])
            args = tuple(_decode(as_list(entry["args"]), nodes, weight))
            kwargs = {
                as_keyword(function, key): _decode(value, nodes, weight) for key, value in entry["kwargs"].items()
            }
            check_arguments(function, args, kwargs)
            node = graph.create_node("call_function", function, args, kwargs, name=name)
        elif kind == "output":
            (results,) = _decode(as_list(entry["args"]), nodes, weight)
            require(
                isinstance(results, list) and all(isinstance(result, fx.Node) for result in results),
                "a result is no node",
            )
            name, node = "output", graph.output(tuple(results))
        else:
            raise GraphError("GRAPH-001", f"a node of kind {kind!r} is not allowed.")
        node.meta = {key: as_text(entry[key]) for key in ("module", "source", "rule") if key in entry}
        nodes[name] = node
    graph.lint()
    return graph


def _input_to_json(entry: Input) -> dict[str, Any]:
    return {"name": entry.name, "dtype": str(entry.dtype).removeprefix("torch."), "dims": list(entry.dims)}


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"weight": value.target} if value.op == "get_attr" else {"node": value.name}
    if isinstance(value, list | tuple):
        return [_encode(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _encode(entry) for key, entry in value.items()}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise GraphError("GRAPH-001", f"an argument of type {type(value).__name__} cannot be written to a graph file.")


def _decode(value: Any, nodes: Mapping[str, fx.Node], weight: Callable[[str], fx.Node], depth: int = 0) -> Any:
    if isinstance(value, list):
        require(depth < DEEPEST, "arguments are nested too deep")
        return [_decode(entry, nodes, weight, depth + 1) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "node":
            return nodes[content]
        case "weight":
            return weight(content)
        case "dtype":
            return _DTYPES[content]
        case "device":
            return torch.device(content)
        case "memory_format":
            return _FORMATS[content]
        case "layout":
            return {"strided": torch.strided}[content]
        case "float":
            return float({"inf": "inf", "-inf": "-inf", "nan": "nan"}[content])
    raise GraphError("GRAPH-001", f"an argument of kind {kind!r} is not allowed.")
