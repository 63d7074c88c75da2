"""Shapes and dtypes of every node, by running the graph on fake tensors with named symbolic dims."""

from collections.abc import Callable, Iterable, Mapping
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
        shapes = [*(entry.dims for entry in program.inputs), *(entry.shape for entry in program.state)]
        # Primes that no other size of a model is likely to equal, because PyTorch gives dims of one size one symbol.
        self.sizes = prime_sizes((dim for dims in shapes for dim in dims), first=2003, apart=2000)
        self.names: dict[sympy.Symbol, str] = {}

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
            return torch.empty(sizes, dtype=dtype, device="cpu")

    def fake_weight(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A fake tensor in the shape of a weight, in another dtype where one is given."""
        with self.mode:
            return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="cpu")


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
            values[node] = _call(context, node.target, node.args, node.kwargs, values.__getitem__)
        elif node.op == "output":
            values[node] = fx.map_arg(node.args[0], values.__getitem__)
    return values


def infer(context: ShapeContext, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The fake result of one call whose arguments are nodes with values."""
    return _call(context, target, args, kwargs, lambda node: node.meta["val"])


def _call(
    context: ShapeContext,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    value_of: Callable[[fx.Node], Any],
) -> Any:
    fake_args, fake_kwargs = fx.map_arg(args, value_of), fx.map_arg(dict(kwargs), value_of)
    op = find_op(target)
    # The dispatcher in Python, because some of PyTorch's own takes no symbolic sizes.
    with context.mode, enable_python_dispatcher(), torch.no_grad():
        return (op.fake if op is not None else target)(*fake_args, **fake_kwargs)


def dim_text(context: ShapeContext | None, size: Any) -> str:
    """A size as people read it: a number, a dim's name, or an expression over names."""
    if not isinstance(size, torch.SymInt):
        return str(size)
    names = context.names if context is not None else {}
    expression = size.node.expr
    return str(expression.subs({symbol: sympy.Symbol(name) for symbol, name in names.items()})).replace(" ", "")
