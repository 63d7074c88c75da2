"""The language of rules: a rule is a pattern, a check and a rewrite.

A pattern is a Python function whose arguments are its bindings and whose body calls `ops`:

    def pattern(x: Tensor, weight: Weight, eps: float) -> Call:
        return ops.mul(weight, ops.mul(x, ops.rsqrt(ops.add(ops.mean(ops.pow(x, 2), LAST_AXIS, True), eps))))

It is traced once. What it means (matcher.py finds it, driver.py applies it):

- **Casts** are looked through, so one pattern serves every placement of `.float()` and `.to(dtype)`.
- **Commutative** ops (`add`, `mul`, ...) match in either order.
- An argument, or a call kept in a variable, that is **used twice** must be the same value both times.
- A **number** in a pattern must be equal in the graph. `LAST_AXIS` is -1 or the axis that it stands for.
- An **annotation** restricts an argument: `Tensor`, `Weight`, `fx.Node`, `float`, `int`, `bool`, `list`. Without one it
  binds to anything.
- `ops.any_of("view", "reshape")(x, shape)` is a call of one of several ops; `any_of(one, other)` is one of several
  patterns, the first that matches. What only the others mention stays unbound.
- Arguments that a call in the pattern does not mention must have their defaults, unless `...` ends the call; then they
  are the check's business.
- Inner values may have **users** outside of the match, any number of them, unless the rule is `exclusive`.
- A pattern may return a tuple: **several outputs**, which must share an argument or a call. So does its rewrite.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from skink.graph.rewriter import Rewriter

aten = torch.ops.aten

# Ops that change how numbers are stored and not what they are (but for rounding).
CASTS = frozenset({aten.to.dtype, aten.to.device, aten.type_as.default, aten._to_copy.default, aten.alias.default})
COMMUTATIVE = frozenset(
    {"add", "mul", "maximum", "minimum", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "eq", "ne"}
)


class Weight:
    """As the annotation of a pattern's argument: a weight that is stored, whatever casts lie upon it."""


@dataclass(frozen=True)
class Variable:
    """An argument of the pattern, bound to a node or a number of its kind; without a kind, to anything."""

    name: str
    kind: Any = None


@dataclass(frozen=True)
class LastAxis:
    """The last axis of the call's first argument, however it is written."""

    def __repr__(self) -> str:
        return "the last axis"


LAST_AXIS = LastAxis()


@dataclass(frozen=True, eq=False)
class Call:
    """A call in the pattern: any overload of one of the ops named.

    Args:
        names: of the ops.
        arguments: variables, calls, numbers, lists of them; `...` at the end for arguments of no interest.
        commutes: whether the two arguments may change places.
        depth: how many calls lie between this one and the farthest argument, itself included.
        inner: the arguments that are calls, with their places, for a first quick look.
    """

    names: tuple[str, ...]
    arguments: tuple[Any, ...]
    commutes: bool = field(init=False)
    depth: int = field(init=False)
    inner: tuple[tuple[int, "Call"], ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "commutes", self.names[0] in COMMUTATIVE and len(self.arguments) == 2)
        object.__setattr__(self, "depth", 1 + max((_depth(argument) for argument in self.arguments), default=0))
        inner = [(place, entry) for place, entry in enumerate(self.arguments) if isinstance(entry, Call)]
        object.__setattr__(self, "inner", tuple(inner))


@dataclass(frozen=True, eq=False)
class AnyOf:
    """One of several patterns for one value."""

    alternatives: tuple[Any, ...]


def _depth(pattern: Any) -> int:
    if isinstance(pattern, Call):
        return pattern.depth
    return max((_depth(part) for part in _inner(pattern)), default=0)


def any_of(*alternatives: Any) -> AnyOf:
    """A value that one of the patterns describes; the first that lets the whole pattern match is taken."""
    return AnyOf(alternatives)


class _Ops:
    """Builds calls: `ops.mul(a, b)`; `ops.any_of("view", "reshape")(x, shape)`."""

    def __getattr__(self, name: str) -> Callable[..., Call]:
        return self.any_of(name)

    def any_of(self, *names: str) -> Callable[..., Call]:
        return lambda *arguments: Call(names, arguments)


ops = _Ops()


@dataclass(frozen=True)
class NoMatch:
    """Why a rule did not apply, at which node, and how many values of the pattern had matched before."""

    reason: str
    node: fx.Node
    progress: int = 0


@dataclass(frozen=True)
class Match:
    """A found pattern.

    Args:
        root: the node of the pattern's first output.
        bindings: what each argument stands for; those of alternatives that were not taken are missing.
        roots: the nodes of all outputs, in the pattern's order.
        nodes: every call of the pattern, roots and inner ones, with the casts between them.
    """

    root: fx.Node
    bindings: dict[str, Any]
    roots: tuple[fx.Node, ...] = ()
    nodes: tuple[fx.Node, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def get(self, name: str, default: Any = None) -> Any:
        """What `name` stands for, or `default` where no alternative that was taken mentions it."""
        return self.bindings.get(name, default)


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Args:
        name: `from-to`, as in logs.
        pattern: see the module's text.
        rewrite: builds what stands for the match's roots and returns it, a node for each; called with new nodes going
            before the first root.
        check: a reason against a structural match, or None. It never edits; `rewrite` never decides.
        exactness: whether the numbers stay the same up to rounding.
        exclusive: whether inner nodes may have no users outside of the match.

    Raises:
        TypeError: where an output of the pattern has nothing in common with those before it.
    """

    name: str
    pattern: Callable[..., Any]
    rewrite: Callable[[Rewriter, Match], fx.Node | Sequence[fx.Node]]
    check: Callable[[Match], NoMatch | None] = lambda match: None
    exactness: Literal["exact", "approximate"] = "exact"
    exclusive: bool = False
    outputs: tuple[Call, ...] = field(init=False)

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.pattern, eval_str=True).parameters.values()
        arguments = [Variable(entry.name, _kind(entry.annotation)) for entry in parameters]
        traced = self.pattern(*arguments)
        outputs = traced if isinstance(traced, tuple) else (traced,)
        for index, output in enumerate(outputs[1:], start=1):
            before = {id(part) for earlier in outputs[:index] for part in parts(earlier)}
            if not any(id(part) in before for part in parts(output)):
                raise TypeError(f"rule {self.name}: output {index} shares no argument and no call with those before it")
        object.__setattr__(self, "outputs", outputs)

    @property
    def depth(self) -> int:
        """Calls from the farthest argument to an output."""
        return max(output.depth for output in self.outputs)


def parts(pattern: Any) -> list[Any]:
    """Every call and variable of a pattern, itself first."""
    if isinstance(pattern, Variable):
        return [pattern]
    own = [pattern] if isinstance(pattern, Call) else []
    return [*own, *(part for entry in _inner(pattern) for part in parts(entry))]


def _inner(pattern: Any) -> Sequence[Any]:
    if isinstance(pattern, Call):
        return pattern.arguments
    if isinstance(pattern, AnyOf):
        return pattern.alternatives
    return pattern if isinstance(pattern, list | tuple) else ()


def _kind(annotation: Any) -> Any:
    return None if annotation in (inspect.Parameter.empty, Any) else annotation


def kind_fits(kind: Any, value: Any) -> str | None:
    """Why `value` is not of an argument's kind, or None."""
    if kind is None:
        return None
    if kind is fx.Node:
        return None if isinstance(value, fx.Node) else "is not a node"
    if kind is Weight:
        below = through_casts(value)
        if not isinstance(below, fx.Node) or below.op != "get_attr":
            return "is not a weight"
        # Without its fraction it is another weight.
        return None if float_bits(value) or value is below else f"is a weight cast to {value.meta['val'].dtype}"
    if kind is Tensor:
        tensor = isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)
        return None if tensor else "is not a tensor"
    if kind in (int, float):
        accepted = int if kind is int else (int, float)
        return None if isinstance(value, accepted) and not isinstance(value, bool) else "is not a number"
    return None if isinstance(value, kind) else f"is not a {kind.__name__}"


def through_casts(value: Any) -> Any:
    """The node below any casts."""
    while isinstance(value, fx.Node) and is_cast(value):
        value = value.args[0]
    return value


def through_float_casts(value: Any, reader: fx.Node | None = None) -> Any:
    """The node below casts that lose nothing: none to integers or booleans, none narrower than the node itself.

    Args:
        value: where the casts begin.
        reader: what reads the value, where its dtype says how many digits count; casts to that dtype are looked through
            as well, whatever lies below them.
    """
    enough = reader.meta["val"].dtype if reader is not None else None
    found, casts = value, []
    while isinstance(value, fx.Node) and is_cast(value):
        source: Any = value.args[0]
        if value.meta["val"].dtype != source.meta["val"].dtype:
            if not float_bits(value) or not float_bits(source):
                return found
            casts.append(value)
        value = source
        if all(_keeps(cast, value.meta["val"].dtype) or _keeps(cast, enough) for cast in casts):
            found = value
    return found


def _keeps(cast: fx.Node, dtype: torch.dtype | None) -> bool:
    """Whether a floating dtype loses no digits by a cast."""
    made = cast.meta["val"].dtype
    return dtype is not None and (made == dtype or (dtype.is_floating_point and made.itemsize > dtype.itemsize))


def below_widening(value: Any) -> Any:
    """The node below casts to float32, which lose nothing."""
    while (
        isinstance(value, fx.Node)
        and is_cast(value)
        and value.target in (aten.to.dtype, aten._to_copy.default)
        and (value.args[1:2] == (torch.float32,) or value.kwargs.get("dtype") is torch.float32)
        and float_bits(value.args[0]) in (16, 32)
    ):
        value = value.args[0]
    return value


def is_cast_to(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether all that is made of `node` is a cast of it to `dtype`."""
    return all(user.target in CASTS and user.meta["val"].dtype == dtype for user in node.users)


def float_bits(value: Any) -> int:
    """Bits of each number of a floating tensor; 0 for what is none."""
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    return tensor.itemsize * 8 if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else 0


# By identity, because the hash of an operator is computed in Python; the target is kept, so its identity stays its own.
_KNOWN: dict[int, tuple[str, bool, Any]] = {}


def op_name(node: fx.Node) -> str:
    """`mul` for any overload of `aten.mul`, `skink.attention` for ours, `` for what is no operator."""
    return _known(node)[0] if node.op == "call_function" else ""


def is_cast(node: fx.Node) -> bool:
    """Whether a node only changes how numbers are stored."""
    return node.op == "call_function" and _known(node)[1]


def _known(node: fx.Node) -> tuple[str, bool, Any]:
    target = node.target
    known = _KNOWN.get(id(target))
    if known is None:
        if isinstance(target, torch._ops.OpOverload):
            name = target._schema.name.removeprefix("aten::").replace("::", ".")
        else:
            name = getattr(target, "__name__", "")
        known = _KNOWN[id(target)] = (name, target in CASTS, target)
    return known
