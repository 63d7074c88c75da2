"""Token mixing: which nodes of a graph are proven to treat every token by itself.

A graph can be stepped where nothing but operators that declare state lets one token's result depend on another token.
The analysis follows the token axis, T, from the inputs through the graph (abstract interpretation): every operator has
a rule that says where the axis goes, or why tokens are mixed. An operator without a rule is taken apart into those that
PyTorch, or the op's own reference, makes of it; where that fails, it mixes.

Proven for a node with a token axis and no entry in `mixes`: token t of its value depends on token t of its arguments,
on weights and on sizes other than T, and not on t or T itself.
"""

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils._python_dispatch import TorchDispatchMode

from skink.graph.mixing_call import Call, MixingError, Value, leaves
from skink.graph.mixing_rules import RULES, SHAPES, Answer, pointwise
from skink.graph.operators import draws_random_numbers
from skink.graph.program import Program
from skink.graph.propagate import ShapeContext, shape_context
from skink.graph.text import target_name
from skink.graph.token_axis import TokenAxis, axis_in_shape, depends_on, size_of
from skink.kernels import OpDef, find_op

# The name of the symbolic dim of tokens.
TOKENS = "T"

# What taking an operator apart can fail with: PyTorch's own errors, on tensors without values among others.
_OPAQUE = (RuntimeError, TypeError, ValueError, LookupError, AssertionError, NotImplementedError)

Axes = tuple[TokenAxis | None, ...]


@dataclass
class TokenMixing:
    """What is known of every node.

    Args:
        axes: by node, the token axis of each tensor of its value, None where it has none.
        mixes: by node, why its value may depend on other tokens than its own; not for operators that declare state.
        origins: the nodes among them that mix tokens themselves, in the order of the graph; the rest read them.
        known: calls of operators that declare state, which mix in a way that can be stepped.
    """

    axes: dict[fx.Node, Axes] = field(default_factory=dict)
    mixes: dict[fx.Node, str] = field(default_factory=dict)
    origins: list[fx.Node] = field(default_factory=list)
    known: list[fx.Node] = field(default_factory=list)

    def token_axis(self, node: fx.Node) -> TokenAxis | None:
        """The token axis of a node's (first) tensor; None where it has none, or none that is known."""
        return next(iter(self.axes.get(node, ())), None)


def token_mixing(program: Program, positions: Collection[fx.Node] = ()) -> TokenMixing:
    """The analysis of a program that is not stepped; shapes are propagated where they were not.

    Args:
        program: captured, canonical or rewritten.
        positions: nodes int64[T] that count tokens, each to be read as its token's own position, which a step knows.
    """
    context = shape_context(program)
    tokens = next((symbol for symbol, name in context.names.items() if name == TOKENS), None)
    result = TokenMixing()
    interpreter = _Interpreter(context, tokens)
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        spoiled = next((source for source in node.all_input_nodes if source in result.mixes), None)
        if spoiled is not None:
            if not _is_size(node.meta["val"]):
                result.mixes[node] = f"it reads %{spoiled.name}."
            continue
        if node in positions:
            result.axes[node] = (TokenAxis(0),)
            continue
        try:
            result.axes[node] = _axes(node, result, interpreter)
        except MixingError as reason:
            result.mixes[node] = str(reason)
            result.origins.append(node)
    return result


def _axes(node: fx.Node, known: TokenMixing, interpreter: "_Interpreter") -> Axes:
    value = node.meta["val"]
    if node.op == "get_attr":
        return (None,)
    if node.op == "placeholder":
        axis = axis_in_shape(value.shape, interpreter.tokens) if interpreter.tokens is not None else None
        interpreter.call("input", {}, [value]).check([axis])
        return (axis,)
    if node.target is operator.getitem and isinstance(value, Tensor):
        source, place = node.args
        return (known.axes[source][place],)  # type: ignore[index]
    if _is_size(value):
        reads_tokens = any(axis is not None for source in node.all_input_nodes for axis in known.axes.get(source, ()))
        if reads_tokens and not _asks_for_size(node.target):
            raise MixingError("it makes a number of tokens' values.")
        return ()

    def wrap(argument: fx.Node) -> Any:
        value = argument.meta["val"]
        if isinstance(value, Tensor):
            return Value(value, known.axes[argument][0])
        if isinstance(value, tuple | list):
            return [Value(entry, axis) for entry, axis in zip(value, known.axes[argument], strict=True)]
        return value

    op = find_op(node.target)
    arguments = bind(node.target, fx.map_arg(node.args, wrap), fx.map_arg(dict(node.kwargs), wrap))
    if op is not None and op.state is not None:
        known.known.append(node)
        return interpreter.stateful(op, arguments, value)
    return interpreter.axes(node.target, arguments, value)


class _Interpreter:
    """Applies the rules to single calls."""

    def __init__(self, context: ShapeContext, tokens: sympy.Symbol | None) -> None:
        self.context = context
        self.tokens = tokens
        self._taken_apart: dict[Any, Axes | str] = {}

    def call(self, name: str, arguments: Mapping[str, Any], results: Sequence[Tensor]) -> Call:
        """A call for a rule."""
        # Without a dim of tokens there is a symbol all the same, which no size has.
        return Call(name, arguments, results, self.tokens if self.tokens is not None else sympy.Symbol(TOKENS))

    def stateful(self, op: OpDef, arguments: Mapping[str, Any], value: Tensor) -> Axes:
        """The token axis that an operator with state gives, if what it remembers are this graph's tokens."""
        assert op.state is not None
        plain = {key: entry.tensor if isinstance(entry, Value) else entry for key, entry in arguments.items()}
        for tensor in op.state.tensors(plain):
            source = arguments[tensor.argument]
            if source.axis != TokenAxis(op.state.axis):
                raise MixingError(
                    f"it remembers axis {op.state.axis} of its {tensor.argument}, which does not hold the tokens."
                )
        axis = axis_in_shape(value.shape, self.call(op.name, {}, [value]).tokens)
        if axis is None or axis != TokenAxis(axis.index):
            raise MixingError("its result does not hold one row for each token.")
        for name, entry in arguments.items():
            if isinstance(entry, Value) and entry.axis is not None:
                # Queries lie as their results do; a mask has its tokens last.
                last = entry.tensor.dim() - 1
                if entry.axis != (axis if last == value.dim() - 1 else TokenAxis(last)):
                    raise MixingError(f"its {name} and its result have their tokens on different axes.")
        return (axis,)

    def axes(self, target: Any, arguments: Mapping[str, Any], value: Any) -> Axes:
        """The token axes of a call's results; raises `MixingError`."""
        results = [entry for entry in leaves(value) if isinstance(entry, Tensor)]
        if draws_random_numbers(target, arguments):
            raise MixingError("it draws random numbers, which differ from step to step.")
        call = self.call(target_name(target).split(".")[1], arguments, results)
        counted = any(depends_on(size, self.tokens) for size in leaves(arguments))
        if not counted and all(entry.axis is None for entry in call.values):
            return (None,) * len(results)  # computed from weights alone, whatever it is
        rule = RULES.get(call.name) if target.namespace == "aten" else None
        if rule is None and torch.Tag.pointwise in target.tags:
            rule = pointwise
        if rule is None:
            return self._take_apart(target, arguments, results)
        self._check_numbers(call)
        axes = _for_each(rule(call), results)
        call.check(axes)
        return axes

    def _check_numbers(self, call: Call) -> None:
        """The number of tokens may be a size, and not a number that tokens are computed with."""
        if call.name in ("slice", "narrow", "repeat", "arange"):
            return  # their rules see to it
        for name, argument in call.arguments.items():
            if name not in SHAPES and any(depends_on(entry, self.tokens) for entry in leaves(argument)):
                raise MixingError(f"its {name} depends on the number of tokens, and a step sees the new tokens only.")

    def _take_apart(self, target: Any, arguments: Mapping[str, Any], results: list[Tensor]) -> Axes:
        """The token axes of a call without a rule, by what it does inside."""
        op = find_op(target)
        composite = "CompositeImplicitAutograd"
        if op is None and not torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), composite):
            raise MixingError("Skink has no rule for this operator, so that it may mix tokens.")
        key = (target, _key(arguments))
        if key not in self._taken_apart:
            try:
                self._taken_apart[key] = _Inside(self).run(op.reference if op is not None else target, arguments)
            except MixingError as reason:
                self._taken_apart[key] = str(reason)
            except _OPAQUE:
                self._taken_apart[key] = "Skink cannot look inside it, so that it may mix tokens."
        found = self._taken_apart[key]
        if isinstance(found, str):
            raise MixingError(found)
        self.call("", arguments, results).check(found)
        return found


class _Inside(TorchDispatchMode):
    """Runs a composite operator on fake tensors, and follows tokens through what it calls."""

    def __init__(self, interpreter: _Interpreter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.interpreter = interpreter
        # By identity; the tensors are kept, so that no identity is given twice.
        self.axes: dict[int, tuple[Tensor, TokenAxis | None]] = {}

    def run(self, function: Any, arguments: Mapping[str, Any]) -> Axes:
        """The token axes of what `function` gives."""

        def unwrap(argument: Any) -> Any:
            if isinstance(argument, Value):
                self.axes[id(argument.tensor)] = (argument.tensor, argument.axis)
                return argument.tensor
            return [unwrap(entry) for entry in argument] if isinstance(argument, list | tuple) else argument

        positional, named = _unbound(function, {name: unwrap(entry) for name, entry in arguments.items()})
        with self.interpreter.context.mode, enable_python_dispatcher(), torch.no_grad(), self:
            result = function(*positional, **named)
        return tuple(self._axis(entry) for entry in leaves(result) if isinstance(entry, Tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        wrapped = bind(func, _map(args, self._wrap), _map(kwargs or {}, self._wrap))
        tensors = [entry for entry in leaves(result) if isinstance(entry, Tensor)]
        if func._schema.is_mutable:
            raise MixingError("it writes in place, which Skink does not follow.")
        has_tokens = any(isinstance(entry, Value) and entry.axis is not None for entry in leaves(wrapped))
        if not tensors and has_tokens and not _asks_for_size(func):
            raise MixingError("it makes a number of tokens' values.")
        if tensors:
            for tensor, axis in zip(tensors, self.interpreter.axes(func, wrapped, tensors), strict=True):
                self.axes[id(tensor)] = (tensor, axis)
        return result

    def _wrap(self, argument: Any) -> Any:
        return Value(argument, self._axis(argument)) if isinstance(argument, Tensor) else argument

    def _axis(self, tensor: Tensor) -> TokenAxis | None:
        return self.axes.get(id(tensor), (tensor, None))[1]


def bind(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of an operator by name, in the order of its schema, defaults filled in."""
    schema = target._schema.arguments
    given = dict(zip((argument.name for argument in schema), args, strict=False)) | dict(kwargs)
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema}


def _unbound(function: Any, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    if not isinstance(function, torch._ops.OpOverload):
        return [], dict(arguments)
    names = {argument.name for argument in function._schema.arguments if argument.kwarg_only}
    positional = [entry for name, entry in arguments.items() if name not in names]
    return positional, {name: entry for name, entry in arguments.items() if name in names}


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


def _asks_for_size(target: Any) -> bool:
    """Whether a call that gives no tensor asks for a size or a device, and not for a tensor's values."""
    return target.namespace == "prim" or target_name(target).startswith("aten.sym_")


def _for_each(answer: Answer, results: Sequence[Tensor]) -> Axes:
    return tuple(answer) if isinstance(answer, list) else (answer,) * len(results)


def _map(argument: Any, function: Any) -> Any:
    if isinstance(argument, Mapping):
        return {key: _map(entry, function) for key, entry in argument.items()}
    if isinstance(argument, list | tuple):
        return [_map(entry, function) for entry in argument]
    return function(argument)


def _key(argument: Any) -> Any:
    """What decides how a call treats tokens: shapes and token axes of tensors, and everything else as it is."""
    if isinstance(argument, Value):
        return tuple(map(size_of, argument.tensor.shape)), argument.tensor.dtype, argument.axis
    if isinstance(argument, Mapping):
        return tuple((name, _key(entry)) for name, entry in argument.items())
    if isinstance(argument, list | tuple):
        return tuple(_key(entry) for entry in argument)
    return type(argument), size_of(argument) if isinstance(argument, torch.SymInt) else repr(argument)
