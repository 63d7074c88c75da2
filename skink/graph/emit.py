"""From a program back to modules: a tree of `nn.Linear`, `nn.Embedding` and plain modules under the original names, and
functions that run the graph on such a tree.

Several graphs (full, stepped, for padded and unpadded input) share one tree. A function looks its layers up in the
tree at every call, so that a layer which PEFT or a user swaps for another is the one that runs.
"""

import linecache
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from skink.graph.program import Program, store_weight
from skink.kernels.pivoted_linear.columns import index_select

aten = torch.ops.aten


def build_tree(programs: Sequence[Program], *, copy: bool = True) -> nn.Module:
    """The modules that hold the weights of `programs`, which share them.

    Args:
        programs: programs over the same weights.
        copy: give the tree tensors of its own; otherwise it shares them with the program, and training it would change
            whatever else holds them.
    """
    root = nn.Module()
    for program in programs:
        tensors = {name: tensor.clone() if copy else tensor for name, tensor in program.weights()}
        for node in program.graph.nodes:
            layer = linear_owner(program, node)
            if layer is not None and layer not in _paths(root):
                _add(root, layer, _make_linear(node, layer, tensors))
            layer = embedding_owner(node)
            if layer is not None and layer not in _paths(root):
                _add(root, layer, _make_embedding(node, tensors[f"{layer}.weight"]))
        present = _tensor_names(root)
        for name, tensor in tensors.items():
            if name not in present:
                store_weight(root, name, tensor, buffer=name in program.buffers)
        _tie(root, program)
    for parameter in root.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return root.eval()


def bind(program: Program) -> Callable[..., Any]:
    """A function `(tree, *inputs) -> results` that runs the program's graph on a tree from `build_tree`."""
    graph = fx.Graph()
    tree = _Tree(graph)
    values: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], values.__getitem__))
        else:
            values[node] = _bound(program, node, tree, values)
    return _compiled(graph)


def bind_part(
    program: Program, nodes: Iterable[fx.Node], entries: Sequence[fx.Node], results: Sequence[fx.Node]
) -> Callable[..., Any]:
    """As `bind` for some of the program's nodes: `(tree, *inputs, *entries) -> list of results`.

    Args:
        program: the nodes' program.
        nodes: what to run, in order; inputs are none of them.
        entries: values that are given.
        results: values that come back, whether made here or given.
    """
    graph = fx.Graph()
    tree = _Tree(graph)
    values = {node: graph.node_copy(node) for node in program.graph.find_nodes(op="placeholder")}
    values.update((node, graph.placeholder(node.name)) for node in entries)
    for node in nodes:
        values[node] = _bound(program, node, tree, values)
    graph.output([values[node] for node in results])
    return _compiled(graph)


class _Tree:
    """Looks layers and weights up in the tree, every part of a path once in a call: a look-up in a module is slow."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._found: dict[str, fx.Node] = {}

    def get(self, path: str) -> fx.Node:
        """The node that gives what stands at `path`."""
        if path not in self._found:
            owner, _, leaf = path.rpartition(".")
            self._found[path] = (
                self.graph.call_function(getattr, (self.get(owner), leaf)) if owner else self.graph.get_attr(leaf)
            )
        return self._found[path]


def _bound(program: Program, node: fx.Node, tree: _Tree, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The node that computes what `node` does, by calls of layers where layers hold its weights."""
    graph = tree.graph
    layer = linear_owner(program, node) or embedding_owner(node)
    if layer is not None:
        data: Any = node.args[1] if node.target is aten.embedding.default else node.args[0]
        return graph.call_function(call_layer, (tree.get(layer), values[data]))
    if "layers" in node.meta:
        pair = [tree.get(path) for path in node.meta["layers"]]
        return graph.call_function(pair_of_layers(node.target), (*pair, values[node.args[0]]))  # type: ignore[index]
    if "pivoted_layers" in node.meta:
        pair = [tree.get(path) for path in node.meta["pivoted_layers"]]
        order = fx.map_arg(node.args[5] if len(node.args) > 5 else None, values.__getitem__)
        return graph.call_function(pivoted_layers(node.target), (*pair, values[node.args[0]], order))  # type: ignore[index]
    if node.op == "get_attr":
        return tree.get(str(node.target))
    return graph.node_copy(node, values.__getitem__)


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    code = graph.python_code("self")
    # Known to linecache, so that a traceback through the graph shows its lines.
    name = f"<skink program {id(graph):x}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
    namespace = dict(code.globals)
    exec(compile(code.src, name, "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    return function


def call_layer(layer: nn.Module, input: Tensor) -> Tensor:
    """What a layer makes of its input."""
    result: Tensor = layer(input)
    return result


@cache
def pair_of_layers(kernel: Callable[..., Tensor]) -> Callable[[nn.Module, nn.Module, Tensor], Tensor]:
    """`(down, up, input) -> up(down(input))` by `kernel(input, *weights)`, while nobody has changed the two layers."""

    def run_pair(down: nn.Module, up: nn.Module, input: Tensor) -> Tensor:
        if _is_plain(down) and _is_plain(up):
            return kernel(input, down.weight, up.weight, up.bias)
        result: Tensor = up(down(input))
        return result

    return run_pair


@cache
def pivoted_layers(kernel: Callable[..., Tensor]) -> Callable[[nn.Module, nn.Module, Tensor, Tensor | None], Tensor]:
    """As `pair_of_layers` for `(kept, rest, input, order) -> [z, rest(z)][order]`, z = kept(input)."""

    def run_pivoted(kept: nn.Module, rest: nn.Module, input: Tensor, order: Tensor | None) -> Tensor:
        if _is_plain(kept) and _is_plain(rest):
            return kernel(input, kept.weight, rest.weight, kept.bias, rest.bias, order)
        z = kept(input)
        both = torch.cat([z, rest(z)], -1)
        return both if order is None else index_select(both, -1, order)

    return run_pivoted


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a linear one that nobody has wrapped, hooked or overridden."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    return type(layer) is nn.Linear and not hooked


def linear_owner(program: Program, node: fx.Node) -> str | None:
    """The path of the `nn.Linear` that stands for `node`, where its weight and bias are stored as one layer's."""
    if node.target is not aten.linear.default:
        return None
    weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    names = [str(weight.target), *(alias for alias, name in program.aliases.items() if name == weight.target)]
    for name in reversed(names):
        layer, _, leaf = name.rpartition(".")
        if not layer or leaf != "weight" or any(embedding_owner(user) == layer for user in weight.users):
            continue
        bias_matches = bias is None or (
            isinstance(bias, fx.Node) and bias.op == "get_attr" and bias.target == f"{layer}.bias"
        )
        same_everywhere = all(
            user.target is not aten.linear.default or (user.args[2:3] or (None,))[0] is bias for user in weight.users
        )
        if bias_matches and same_everywhere:
            return layer
    return None


def embedding_owner(node: fx.Node) -> str | None:
    if node.target is not aten.embedding.default:
        return None
    weight = node.args[0]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    layer, _, leaf = str(weight.target).rpartition(".")
    return layer if layer and leaf == "weight" else None


def _make_linear(node: fx.Node, layer: str, tensors: dict[str, Tensor]) -> nn.Linear:
    weight = tensors[str(node.args[1].target)]  # type: ignore[union-attr]
    bias = tensors.get(f"{layer}.bias") if len(node.args) > 2 and node.args[2] is not None else None
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear


def _make_embedding(node: fx.Node, weight: Tensor) -> nn.Embedding:
    padding = node.args[2] if len(node.args) > 2 else -1
    embedding = nn.Embedding(
        weight.shape[0],
        weight.shape[1],
        padding_idx=padding if isinstance(padding, int) and padding >= 0 else None,
        device="meta",
        dtype=weight.dtype,
    )
    embedding.weight = nn.Parameter(weight)
    return embedding


def _tie(root: nn.Module, program: Program) -> None:
    """Let layers of tied weights hold one parameter."""
    for alias, name in program.aliases.items():
        owner, _, leaf = alias.rpartition(".")
        if owner in _paths(root):
            source, _, source_leaf = name.rpartition(".")
            setattr(root.get_submodule(owner), leaf, getattr(root.get_submodule(source), source_leaf))


def tied_names(program: Program, tree: nn.Module) -> dict[str, str]:
    """Names of parameters in the tree that are others by a second name: {second: first}."""
    present = _tensor_names(tree)
    return {alias: name for alias, name in program.aliases.items() if alias in present}


def _tensor_names(root: nn.Module) -> set[str]:
    return {name for name, _ in root.named_parameters(remove_duplicate=False)} | {
        name for name, _ in root.named_buffers(remove_duplicate=False)
    }


def _paths(root: nn.Module) -> set[str]:
    return {name for name, _ in root.named_modules(remove_duplicate=False)}


def _add(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, leaf = path.split(".")
    owner = root
    for part in parents:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
    owner.add_module(leaf, module)


class EmittedModule(nn.Module):
    """A program as a module: see `Program.module`."""

    def __init__(self, program: Program, *, copy: bool = True) -> None:
        super().__init__()
        tree = build_tree([program], copy=copy)
        for name, child in tree.named_children():
            self.add_module(name, child)
        for name, parameter in tree.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in tree.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.eval()
        self._run = bind(program)
        self._single = len(program.outputs) + len(program.state) == 1

    def forward(self, *inputs: Tensor) -> Any:
        """The program's outputs: one tensor, or a tuple of them."""
        results = self._run(self, *inputs)
        return results[0] if self._single else results
