"""Shapes and dtypes of every node, by running the graph on fake tensors with named symbolic dims."""

from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from skink.graph.program import Program
from skink.kernels import find_op


def prime_sizes(dims: Iterable[int | str], *, first: int, apart: int) -> dict[str, int]:
    """A prime for each named dim among `dims`, from `first` on and at least `apart` from each other."""
    sizes: dict[str, int] = {}
    least = first
    for dim in dims:
        if isinstance(dim, str) and dim not in sizes:
            sizes[dim] = int(sympy.nextprime(least - 1))
            least = sizes[dim] + apart
    return sizes


class ShapeContext:
    """One fake mode, with the program's dims as symbols; lives in `graph_module.meta["shapes"]`."""

    def __init__(self, program: Program) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        # What calls give is remembered here, by less than PyTorch's own memory of them computes to tell them apart.
        self.mode.cache_enabled = False
        shapes = [*(entry.dims for entry in program.inputs), *(entry.shape for entry in program.state)]
        # Primes that no other size of a model is likely to equal, because PyTorch gives dims of one size one symbol.
        self.sizes = prime_sizes((dim for dims in shapes for dim in dims), first=2003, apart=2000)
        for dim, longest in program.origin.get("longest", {}).items():
            if dim in self.sizes and self.sizes[dim] > longest:
                self.sizes[dim] = int(sympy.prevprime(longest + 1))
        self.names: dict[sympy.Symbol, str] = {}
        self._known: dict[Any, Any] = {}
        self._calls: dict[Any, tuple[Any, Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShapeContext":
        # Fake tensors of symbolic sizes cannot be copied; a copy of the graph may keep what is known of the same calls.
        return self

    def fake_input(self, dims: tuple[int | str, ...], dtype: torch.dtype) -> torch.Tensor:
        """A fake tensor of these dims."""
        shape = [self.sizes[dim] if isinstance(dim, str) else dim for dim in dims]
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.DUCK if isinstance(dim, str) else DimDynamic.STATIC for dim in dims]
        )
        example = torch.empty(shape, dtype=dtype, device="meta")
        sizes: tuple[Any, ...] = self.mode.from_tensor(example, symbolic_context=context).shape
        for dim, size in zip(dims, sizes, strict=True):
            if isinstance(dim, str) and isinstance(size, torch.SymInt):
                self.names[size.node.expr] = dim
        with self.mode:
            # On a real device, so that ops which name one agree with their inputs.
            fake = torch.empty(sizes, dtype=dtype, device="cpu")
        one: torch.Tensor = self._one_of_a_kind(fake)
        return one

    def fake_weight(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A fake tensor in the shape of a weight, in another dtype where one is given."""
        key = (tensor.shape, dtype or tensor.dtype)
        if key not in self._known:
            with self.mode:
                fake = torch.empty(tensor.shape, dtype=key[1], device="cpu")
            self._known[key] = self._one_of_a_kind(fake)
        one: torch.Tensor = self._known[key]
        return one

    def call(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The fake result of one call on fake values, found once for each target and arguments.

        Layers repeat, so most calls of a model are calls that were made before. Values of one kind (dims, strides and
        dtype) are one object, and calls are told apart by the identities of their arguments.
        """
        key = (target, _identity(args), _identity(kwargs)) if _repeatable(target) else None
        if key is not None and key in self._calls:
            return self._calls[key][0]
        op = find_op(target)
        # The dispatcher in Python, because some of PyTorch's own takes no symbolic sizes.
        with self.mode, enable_python_dispatcher(), torch.no_grad():
            if key is None:
                # PyTorch remembers such a size with the tensor that it was found for, and ours stand for many.
                args = tuple([entry.clone() if isinstance(entry, torch.Tensor) else entry for entry in args])
            result = (op.fake if op is not None else target)(*args, **kwargs)
        if key is not None:
            result = self._one_of_a_kind(result)
            self._calls[key] = (result, (args, kwargs))  # the arguments stay alive, and so their identities stay theirs
        return result

    def _one_of_a_kind(self, value: Any) -> Any:
        """The first value seen that is like `value`."""
        if isinstance(value, tuple | list):
            return type(value)([self._one_of_a_kind(entry) for entry in value])
        if isinstance(value, torch.Tensor):
            key = (tuple(map(expression, value.shape)), tuple(map(expression, value.stride())), value.dtype)
            return self._known.setdefault(key, value)
        return self._known.setdefault(value.node.expr, value) if isinstance(value, torch.SymInt) else value


def expression(size: Any) -> Any:
    """A size that can be compared without guarding on it: a number, or an expression over symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _identity(value: Any) -> Any:
    """A key for an argument of a call: fake values by identity, plain ones by type and value."""
    if isinstance(value, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
        return id(value)
    if isinstance(value, tuple | list):
        return tuple([_identity(entry) for entry in value])
    if isinstance(value, Mapping):
        return tuple([(name, _identity(entry)) for name, entry in value.items()])
    return type(value), value


def _repeatable(target: Any) -> bool:
    """Whether two calls alike have results alike; sizes that depend on values are new at every call."""
    return torch.Tag.dynamic_output_shape not in getattr(target, "tags", ()) and (
        torch.Tag.data_dependent_output not in getattr(target, "tags", ())
    )


def shape_context(program: Program) -> ShapeContext:
    """The program's shape context, propagating shapes first where that was not done yet."""
    if "shapes" not in program.graph_module.meta:
        propagate(program)
    context: ShapeContext = program.graph_module.meta["shapes"]
    return context


def refresh(program: Program) -> None:
    """Propagate shapes where that was not done yet, or where weights have another shape or dtype since."""
    for node in program.graph.find_nodes(op="get_attr"):
        known, weight = node.meta.get("val"), program.weight(node.target)
        if known is None or known.shape != weight.shape or known.dtype != weight.dtype:
            propagate(program)
            return
    shape_context(program)


def propagate(program: Program) -> None:
    """Set `meta["val"]` of every node anew."""
    context = ShapeContext(program)
    for node, value in evaluate(program, context).items():
        node.meta["val"] = value
    program.graph_module.meta["shapes"] = context


def evaluate(program: Program, context: ShapeContext, *, weights_as: torch.dtype | None = None) -> dict[fx.Node, Any]:
    """The fake value of every node; with `weights_as`, as if the trained weights had that dtype."""
    specs = [(entry.dims, entry.dtype) for entry in program.inputs]
    specs += [(entry.shape, weights_as or program.dtype) for entry in program.state]
    remaining = iter(specs)
    values: dict[fx.Node, Any] = {}
    weights: dict[str, torch.Tensor] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            dims, dtype = next(remaining)
            values[node] = context.fake_input(dims, dtype)
        elif node.op == "get_attr":
            if node.target not in weights:
                trained = node.target not in program.buffers
                weights[node.target] = context.fake_weight(program.weight(node.target), weights_as if trained else None)
            values[node] = weights[node.target]
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            values[node] = context.call(node.target, args, kwargs)
        elif node.op == "output":
            values[node] = fx.map_arg(node.args[0], values.__getitem__)
    return values


def infer(context: ShapeContext, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The fake result of one call whose arguments are nodes with values."""
    fake_args, fake_kwargs = fx.map_arg((args, dict(kwargs)), lambda node: node.meta["val"])
    return context.call(target, fake_args, fake_kwargs)


def dim_text(context: ShapeContext | None, size: Any) -> str:
    """A size as people read it: a number, a dim's name, or an expression over names."""
    if not isinstance(size, torch.SymInt):
        return str(size)
    names = context.names if context is not None else {}
    expression = size.node.expr
    return str(expression.subs({symbol: sympy.Symbol(name) for symbol, name in names.items()})).replace(" ", "")
