"""Patterns over graphs: a rule is a pattern, a check and a rewrite.

A pattern is a Python function whose arguments are its bindings and whose body calls `ops`:

    def pattern(x, weight, eps):
        return ops.mul(weight, ops.mul(x, ops.rsqrt(ops.add(ops.mean(ops.pow(x, 2), [-1], True), eps))))

It is traced once. Matching looks through casts, so one pattern serves every placement of `.float()` and `.to(dtype)`;
`add` and `mul` match in either order; an argument used twice must be bound to the same value; a number in a pattern
must be equal in the graph. Arguments that the pattern does not mention must have their defaults, unless `...` ends the
call; then they are the check's business. A failed match says why and where.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

from skink.graph.program import Program
from skink.graph.rewriter import Rewriter

aten = torch.ops.aten

# Ops that change how numbers are stored and not what they are (but for rounding).
_CASTS = frozenset({aten.to.dtype, aten.to.device, aten.type_as.default, aten._to_copy.default, aten.alias.default})
_COMMUTATIVE = frozenset({"add", "mul"})


@dataclass(frozen=True)
class Variable:
    """An argument of the pattern: binds to any node or number."""

    name: str


@dataclass(frozen=True)
class Call:
    """A call in the pattern: any overload of one of the ops named."""

    names: tuple[str, ...]
    arguments: tuple[Any, ...]


class _Ops:
    """Builds calls: `ops.mul(a, b)`; `ops.any_of("view", "reshape")(x, shape)`."""

    def __getattr__(self, name: str) -> Callable[..., Call]:
        return self.any_of(name)

    def any_of(self, *names: str) -> Callable[..., Call]:
        return lambda *arguments: Call(names, arguments)


ops = _Ops()


@dataclass(frozen=True)
class NoMatch:
    """Why a rule did not apply, and at which node."""

    reason: str
    node: fx.Node


@dataclass(frozen=True)
class Match:
    """A found pattern: its last node, and what each argument stands for."""

    root: fx.Node
    bindings: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Args:
        name: `from-to`, as in logs.
        pattern: see the module's text.
        rewrite: builds what stands for the match's root and returns it; called with new nodes going before the root.
        check: a reason against a structural match, or None.
        exactness: whether the numbers stay the same up to rounding.
    """

    name: str
    pattern: Callable[..., Call]
    rewrite: Callable[[Rewriter, Match], fx.Node]
    check: Callable[[Match], NoMatch | None] = lambda match: None
    exactness: Literal["exact", "approximate"] = "exact"
    traced: Call = field(init=False)

    def __post_init__(self) -> None:
        arguments = [Variable(name) for name in inspect.signature(self.pattern).parameters]
        object.__setattr__(self, "traced", self.pattern(*arguments))


def through_casts(value: Any) -> Any:
    """The node below any casts."""
    while isinstance(value, fx.Node) and value.op == "call_function" and value.target in _CASTS:
        value = value.args[0]
    return value


def below_widening(value: Any) -> Any:
    """The node below casts to float32 or float64, which lose nothing."""
    while (
        isinstance(value, fx.Node)
        and value.target in (aten.to.dtype, aten._to_copy.default)
        and (value.args[1:2] == (torch.float32,) or value.kwargs.get("dtype") is torch.float32)
        and _bits(value.args[0]) in (16, 32)
    ):
        value = value.args[0]
    return value


def is_cast_to(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether all that is made of `node` is a cast of it to `dtype`."""
    return all(user.target in _CASTS and user.meta["val"].dtype == dtype for user in node.users)


def _bits(value: Any) -> int:
    """Bits of each number of a floating tensor; 0 for what is none."""
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    return tensor.itemsize * 8 if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else 0


def op_name(node: fx.Node) -> str:
    """`mul` for any overload of `aten.mul`, `skink.attention` for ours, `` for what is no operator."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", "") if node.op == "call_function" else ""
    name = target._schema.name
    return name.removeprefix("aten::").replace("::", ".")


def match(pattern: Call, root: fx.Node) -> Match | NoMatch:
    """Match `pattern` with `root` as its last node (casts at the very end are not part of it).

    Where it does not match, the reason is that of the attempt that came furthest.
    """
    search = _Search()
    for found in search.call(pattern, root, _Partial({}, (), 0)):
        least = min((bits for value in found.bindings.values() if (bits := _bits(value))), default=0)
        lossy = next((cast for cast in found.casts if _bits(cast) < least), None)
        if lossy is None:
            return Match(root, found.bindings)
        search.fail(found, f"{lossy.meta['val'].dtype} on the way loses digits that the pattern keeps", lossy)
    if search.failure is None:
        raise TypeError("a pattern neither matched nor failed")
    return search.failure


@dataclass(frozen=True)
class _Partial:
    """A match so far: bindings, casts that were looked through, and how many values matched."""

    bindings: dict[str, Any]
    casts: tuple[fx.Node, ...]
    steps: int


class _Search:
    """Tries every order of commutative arguments; yields each way in which a part matches."""

    def __init__(self) -> None:
        self.failure: NoMatch | None = None
        self._furthest = -1

    def fail(self, partial: _Partial, reason: str, node: fx.Node) -> None:
        if partial.steps > self._furthest:
            self._furthest, self.failure = partial.steps, NoMatch(reason, node)

    def call(self, pattern: Call, node: fx.Node, partial: _Partial) -> Iterator[_Partial]:
        if op_name(node) not in pattern.names:
            self.fail(partial, f"{' or '.join(pattern.names)} expected, found {op_name(node) or node.op}", node)
            return
        wanted = pattern.arguments
        if wanted[-1] is ...:
            wanted = wanted[:-1]
        elif unmentioned := _given_beyond(node, len(wanted)):
            self.fail(partial, f"{unmentioned} is given", node)
            return
        if len(node.args) < len(wanted):
            self.fail(partial, f"{len(wanted)} arguments expected, found {len(node.args)}", node)
            return
        partial = replace(partial, steps=partial.steps + 1)
        yield from self._all(wanted, node.args, node, partial)
        if pattern.names[0] in _COMMUTATIVE and len(node.args) == 2:
            yield from self._all(wanted, (node.args[1], node.args[0]), node, partial)

    def _all(self, wanted: Sequence[Any], found: Sequence[Any], user: fx.Node, partial: _Partial) -> Iterator[_Partial]:
        if not wanted:
            yield partial
            return
        for one in self._value(wanted[0], found[0], user, partial):
            yield from self._all(wanted[1:], found[1:], user, one)

    def _value(self, wanted: Any, found: Any, user: fx.Node, partial: _Partial) -> Iterator[_Partial]:
        if isinstance(wanted, Call):
            yield from self._below_casts(wanted, found, user, partial)
        elif isinstance(wanted, Variable):
            value = below_widening(found)
            bound = partial.bindings.get(wanted.name, value)
            if bound is value or (not isinstance(bound, fx.Node) and bound == value):
                yield replace(partial, bindings={**partial.bindings, wanted.name: value}, steps=partial.steps + 1)
            else:
                self.fail(partial, f"{wanted.name} is used twice, for two different values", user)
        elif isinstance(wanted, list | tuple):
            if isinstance(found, list | tuple) and len(found) == len(wanted):
                yield from self._all(wanted, found, user, partial)
            else:
                self.fail(partial, f"{list(wanted)} expected, found {found!r}", user)
        elif found == wanted:
            yield replace(partial, steps=partial.steps + 1)
        else:
            self.fail(partial, f"{wanted!r} expected, found {found!r}", user)

    def _below_casts(self, wanted: Call, found: Any, user: fx.Node, partial: _Partial) -> Iterator[_Partial]:
        casts = []
        while isinstance(found, fx.Node) and found.target in _CASTS:
            if not _bits(found):
                self.fail(partial, f"{wanted.names[0]} expected, found a cast to {found.meta['val'].dtype}", found)
                return
            casts.append(found)
            found = found.args[0]
        if not isinstance(found, fx.Node):
            self.fail(partial, f"{wanted.names[0]} expected, found {found!r}", user)
            return
        yield from self.call(wanted, found, replace(partial, casts=(*partial.casts, *casts)))


def _given_beyond(node: fx.Node, count: int) -> str:
    """The first argument after `count` positional ones that is not its default: `alpha=2`."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    for index, argument in enumerate(node.target._schema.arguments):
        default = argument.default_value
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, default)
        if index >= count and given is not default and given != default:
            return f"{argument.name}={given}"
    return ""


def apply_rules(program: Program, rewriter: Rewriter, rules: Sequence[Rule]) -> dict[str, list[NoMatch]]:
    """Apply every rule wherever it matches, once over the graph; the first rule that matches a node wins.

    Returns:
        For each rule, the structural matches that its check refused.
    """
    by_root: dict[str, list[Rule]] = {}
    for rule in rules:
        for name in rule.traced.names:
            by_root.setdefault(name, []).append(rule)
    refused: dict[str, list[NoMatch]] = {}
    for node in list(program.graph.nodes):
        for rule in by_root.get(op_name(node), ()) if node.users else ():
            found = match(rule.traced, node)
            if isinstance(found, NoMatch):
                continue
            reason = rule.check(found)
            if reason is not None:
                refused.setdefault(rule.name, []).append(reason)
                continue
            with rewriter.before(node):
                new = rule.rewrite(rewriter, found)
                if new.meta["val"].dtype != node.meta["val"].dtype and not is_cast_to(node, new.meta["val"].dtype):
                    new = rewriter.call(aten.to.dtype, new, node.meta["val"].dtype, rule=rule.name)
            rewriter.replace(node, new, rule=rule.name)
            break
    rewriter.finish()
    return refused
