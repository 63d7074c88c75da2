"""From an `ExportedProgram` to a `Program`: weights under their own names, without the exporter's bookkeeping."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind

from skink.errors import CaptureError
from skink.graph.operators import draws_random_numbers
from skink.graph.program import Program, Stage, is_taken, store_weight
from skink.graph.provenance import provenance

if TYPE_CHECKING:
    from skink.graph.capture import Subject

aten = torch.ops.aten

_ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
)

# A program is a function: what is yet to be written, in parts, begins as zeros.
_UNDEFINED = {
    aten.empty.memory_format: aten.zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
    aten.new_empty.default: aten.new_zeros.default,
}


def lift(exported: ExportedProgram, subject: "Subject") -> Program:
    """The exported graph as a program at stage `captured`."""
    graph = fx.Graph()
    root = nn.Module()
    originals = _original_tensors(subject.model)
    buffers: set[str] = set()
    values: dict[fx.Node, Any] = {}
    trained: list[fx.Node] = []

    signature = {spec.arg.name: spec for spec in exported.graph_signature.input_specs if hasattr(spec.arg, "name")}
    weights: dict[str, fx.Node] = {}
    users = [old for old in exported.graph.find_nodes(op="placeholder") if _is_input(signature[old.name])]
    for old, entry in zip(users, subject.inputs, strict=True):
        values[old] = graph.placeholder(entry.name)
    for old in exported.graph.nodes:
        if old.op != "placeholder" or old in values:
            continue
        spec = signature[old.name]
        name = _unwrapped(str(spec.target), subject.prefix)
        if spec.kind is InputKind.CONSTANT_TENSOR and name not in originals.canonical:
            tensor = _real_constant(exported.constants[str(spec.target)], name)
            name = f"constants.{name}"
        else:
            name = originals.canonical[name]
            tensor = originals.tensors[name]
        if name not in weights:
            is_buffer = spec.kind is not InputKind.PARAMETER
            store_weight(root, name, tensor, buffer=is_buffer)
            if is_buffer or not tensor.is_floating_point():
                buffers.add(name)
            weights[name] = graph.get_attr(name)
            if spec.kind is InputKind.PARAMETER and tensor.is_floating_point():
                trained.append(weights[name])
        values[old] = weights[name]

    _copy_nodes(exported.graph_module, graph, values, root, buffers, subject.prefix)
    kept = [values[node] for node in _results(exported, subject)]
    graph.output(tuple(kept))
    if subject.cast is not None and trained:
        # A weight that no linear layer reads: passes replace those that one does.
        reference = min(trained, key=lambda node: any(user.target is aten.linear.default for user in node.users))
        _make_casts_follow_the_weights(graph, subject.cast, reference)
    _check_names(node.target for node in graph.nodes if node.op == "get_attr")
    graph.eliminate_dead_code()
    module = fx.GraphModule(root, graph)
    names = subject.outputs or tuple(f"output_{index}" for index in range(len(kept)))
    used = {node.target for node in graph.nodes if node.op == "get_attr"}
    program = Program(
        graph_module=module,
        inputs=subject.inputs,
        outputs=names,
        buffers=frozenset(buffers & used),
        aliases={alias: name for alias, name in originals.canonical.items() if alias != name and name in used},
        any_dtype=subject.cast is not None,
        stage=Stage.CAPTURED,
        origin={"class": type(subject.model).__name__, "torch": torch.__version__},
    )
    program.drop_unused_weights()
    return program


def _is_input(spec: InputSpec) -> bool:
    return spec.kind is InputKind.USER_INPUT


def _results(exported: ExportedProgram, subject: "Subject") -> list[fx.Node]:
    """The nodes that the model returns; what it returns besides tensors must be None."""
    results: list[fx.Node] = []
    output = exported.graph.output_node()
    for argument, spec in zip(output.args[0], exported.graph_signature.output_specs, strict=True):
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
            weight = _unwrapped(str(spec.target), subject.prefix)
            raise CaptureError(
                "CAPTURE-002",
                f"{type(subject.model).__name__}.forward writes to its own {weight!r}, and a program remembers nothing "
                "between calls.",
                fix="pass that tensor in and return the new one.",
            )
        if spec.kind is not OutputKind.USER_OUTPUT or argument is None:
            continue
        if not isinstance(argument, fx.Node) or not isinstance(argument.meta["val"], Tensor):
            raise CaptureError(
                "CAPTURE-002",
                f"{type(subject.model).__name__}.forward returns {argument}, which is not a tensor.",
                fix="return tensors only.",
            )
        results.append(argument)
    return results


class _Originals:
    """The model's own tensors: every name → the first name of the same tensor, and that name → the tensor."""

    def __init__(self) -> None:
        self.canonical: dict[str, str] = {}
        self.tensors: dict[str, Tensor] = {}


def _original_tensors(model: nn.Module) -> _Originals:
    originals = _Originals()
    first: dict[int, str] = {}
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in everything:
        owner = first.setdefault(id(tensor), name)
        originals.canonical[name] = owner
        originals.tensors.setdefault(owner, tensor.detach())
    return originals


def _check_names(names: Iterable[Any]) -> None:
    for name in names:
        if is_taken(str(name)):
            raise CaptureError(
                "CAPTURE-002",
                f"the weight {name!r} lies in a module whose name torch.fx keeps for itself.",
                fix=f"rename the attribute {str(name).partition('.')[0]!r} of the model, or wrap the model in another.",
            )


def _unwrapped(name: str, prefix: str) -> str:
    return name.removeprefix(prefix)


def _real_constant(tensor: Tensor, name: str) -> Tensor:
    if isinstance(tensor, torch._subclasses.FakeTensor):
        constant = tensor.constant
        if constant is None:
            raise CaptureError(
                "CAPTURE-002",
                f"the model computes the constant {name!r} from its weights while it runs, outside the graph.",
                fix="compute it in forward from registered parameters, or register it as a buffer.",
            )
        return constant
    return tensor.detach().clone()


def _copy_nodes(
    source: fx.GraphModule, graph: fx.Graph, values: dict[fx.Node, Any], root: nn.Module, buffers: set[str], prefix: str
) -> Any:
    """Copy the calls of `source` into `graph`, without assertions; returns what `source` returns."""
    regions: dict[fx.Node, fx.GraphModule] = {}
    for old in source.graph.nodes:
        if old.op == "get_attr":
            attribute = getattr(source, str(old.target))
            if isinstance(attribute, fx.GraphModule):
                regions[old] = attribute
            else:
                name = f"constants.{old.target}"
                store_weight(root, name, _real_constant(attribute, name), buffer=True)
                buffers.add(name)
                values[old] = graph.get_attr(name)
        elif old.op == "call_function":
            if old.target in _ASSERTIONS:
                continue
            _check_random(old, prefix)
            region = next((a for a in old.args if isinstance(a, fx.Node) and a in regions), None)
            if region is not None:
                _check_region(old)
                # wrap_with_set_grad_enabled(enabled, region, *inputs) and its like: run the region in place.
                inner = regions[region]
                inputs = old.args[old.args.index(region) + 1 :]
                inner_values = dict(values)
                for placeholder, argument in zip(inner.graph.find_nodes(op="placeholder"), inputs, strict=True):
                    inner_values[placeholder] = fx.map_arg(argument, lambda node: values[node])
                values[old] = _copy_nodes(inner, graph, inner_values, root, buffers, prefix)
                continue
            if _is_item_of_region(old, values):
                values[old] = values[old.args[0]][old.args[1]]
                continue
            new = graph.node_copy(old, lambda node: values[node])
            if new.target is aten.to.device:
                _forget_device(new)
            elif new.target in _UNDEFINED:
                new.target = _UNDEFINED[new.target]
                new.kwargs = {name: value for name, value in new.kwargs.items() if name != "memory_format"}
            new.meta = provenance(old, prefix)
            values[old] = new
        elif old.op == "output":
            return fx.map_arg(old.args[0], lambda node: values[node])
    return None


def _check_region(call: fx.Node) -> None:
    """Only regions that compute what their nodes would compute outside of them can be run in place."""
    name = getattr(call.target, "__name__", str(call.target))
    # wrap_with_autocast(device, dtype, enabled, ...)
    if name == "wrap_with_set_grad_enabled" or (name == "wrap_with_autocast" and not call.args[2]):
        return
    autocast = name == "wrap_with_autocast"
    raise CaptureError(
        "CAPTURE-002",
        "the model turns autocast on inside forward." if autocast else f"the model calls {name}, a region of its own.",
        where=provenance(call, "").get("source", ""),
        fix="cast explicitly, or use another dtype for the whole model." if autocast else "write it with torch.where.",
    )


def _check_random(call: fx.Node, prefix: str) -> None:
    if isinstance(call.target, torch._ops.OpOverload):
        schema = call.target._schema.arguments
        given = dict(zip((argument.name for argument in schema), call.args, strict=False)) | call.kwargs
        if draws_random_numbers(call.target, given):
            found = provenance(call, prefix)
            raise CaptureError(
                "CAPTURE-006",
                f"the model draws random numbers ({call.target}), and a program gives the same at every call.",
                where=", ".join(found[key] for key in ("module", "source") if found.get(key)),
                fix="draw them outside and pass them in, or call model.eval() if they are for training only.",
            )


def _forget_device(cast: fx.Node) -> None:
    """A program has one device, wherever its weights are: `to(device, dtype)` is a cast."""
    cast.target, cast.args = aten.to.dtype, (cast.args[0], cast.args[2])


def _is_item_of_region(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    source = node.args[0] if node.args else None
    return (
        getattr(node.target, "__name__", "") == "getitem"
        and isinstance(source, fx.Node)
        and isinstance(values.get(source), tuple | list)
    )


def _make_casts_follow_the_weights(graph: fx.Graph, dtype: torch.dtype, reference: fx.Node) -> None:
    """Casts to the dtype of the export become casts to the dtype of a weight, whatever that will be."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        is_cast = node.target in (aten.to.dtype, aten.to.device, aten._to_copy.default, aten.to.dtype_layout)
        position = next((i for i, argument in enumerate(node.args) if argument is dtype), None)
        keyword = next((key for key, argument in node.kwargs.items() if argument is dtype), None)
        if position is None and keyword is None:
            continue
        with graph.inserting_after(node):
            if is_cast:
                cast = graph.call_function(aten.type_as.default, (node.args[0], reference))
                cast.meta = dict(node.meta)
                node.replace_all_uses_with(cast)
                graph.erase_node(node)
                continue
            # A factory or a reduction with an explicit dtype: computed in float32, then cast.
            cast = graph.call_function(aten.type_as.default, (node, reference))
            cast.meta = dict(node.meta)
            node.replace_all_uses_with(cast, delete_user_cb=lambda user, keep=cast: user is not keep)
        if position is not None:
            node.update_arg(position, torch.float32)
        else:
            node.update_kwarg(keyword, torch.float32)
