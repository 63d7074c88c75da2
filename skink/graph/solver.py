"""The quick half of matching: whether one output of a pattern is at a node, without reasons.

What it decides and what matcher.py explains must agree, which a test holds them to.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from skink.graph.pattern import (
    AnyOf,
    Call,
    LastAxis,
    Variable,
    below_widening,
    float_bits,
    is_cast,
    kind_fits,
    op_name,
)

MISSING = object()


@dataclass(frozen=True)
class Partial:
    """A match so far.

    Args:
        bindings: arguments by name; calls that matched, by identity.
        casts: those that were looked through.
        steps: how many values matched.
        roots: the outputs found.
    """

    bindings: dict[str | int, Any]
    casts: tuple[fx.Node, ...] = ()
    steps: int = 0
    roots: tuple[fx.Node, ...] = ()


# Still to be matched: a part of the pattern, the value that it must describe, the node that reads the value, the rest.
Tasks = tuple[Any, Any, fx.Node, Any] | None


def solve(pattern: Call, node: fx.Node) -> Partial | None:
    """The first way in which `pattern` matches with `node` as its last call."""
    if op_name(node) not in pattern.names:
        return None
    bindings: dict[str | int, Any] = {}
    casts: list[fx.Node] = []
    if not _choose(_orders(pattern, node, None, bindings), bindings, casts):
        return None
    return Partial(bindings, tuple(casts), len(bindings), (node,))


def _solve(tasks: Tasks, bindings: dict[str | int, Any], casts: list[fx.Node]) -> bool:
    """Match all tasks in turn; where there is a choice, try each with all that is left to do."""
    while tasks is not None:
        wanted, found, user, rest = tasks
        kind = type(wanted)
        if kind is Call:
            while isinstance(found, fx.Node) and is_cast(found):
                if not float_bits(found):
                    return False
                casts.append(found)
                found = found.args[0]
            if not isinstance(found, fx.Node) or op_name(found) not in wanted.names:
                return False
            options = _orders(wanted, found, rest, bindings)
            if len(options) != 1:
                return _choose(options, bindings, casts)
            tasks = options[0]
        elif kind is Variable:
            if found is MISSING:
                return False
            value = below_widening(found)
            if wanted.kind is not None and kind_fits(wanted.kind, value) is not None:
                return False
            bound = bindings.setdefault(wanted.name, value)
            if bound is not value and (isinstance(bound, fx.Node) or type(bound) is not type(value) or bound != value):
                return False
            tasks = rest
        elif kind is AnyOf:
            return _choose([(option, found, user, rest) for option in wanted.alternatives], bindings, casts)
        elif kind is list or kind is tuple:
            if not isinstance(found, list | tuple) or len(found) != len(wanted):
                return False
            tasks = _push(wanted, found, user, rest)
        elif equal(wanted, found, user):
            tasks = rest
        else:
            return False
    return True


def _orders(pattern: Call, node: fx.Node, rest: Tasks, bindings: dict[str | int, Any]) -> list[Tasks]:
    """What is to be matched once `node` stands for a call: a way for each order of its arguments that could fit."""
    if bindings.setdefault(id(pattern), node) is not node:
        return []
    wanted: Sequence[Any] = pattern.arguments
    if wanted and wanted[-1] is ...:
        wanted = wanted[:-1]
    elif (node.kwargs or len(node.args) > len(wanted)) and given_beyond(node, len(wanted)):
        return []
    given = node.args if len(node.args) == len(wanted) else arguments_of(node, len(wanted))
    options = [_push(wanted, given, node, rest)] if _could_be(pattern.inner, given) else []
    if pattern.commutes:
        turned = (given[1], given[0])
        if _could_be(pattern.inner, turned):
            options.append(_push(wanted, turned, node, rest))
    return options


def _choose(options: Sequence[Tasks], bindings: dict[str | int, Any], casts: list[fx.Node]) -> bool:
    """Whether one of the ways to go on matches to the end; what it bound is then in `bindings`."""
    if len(options) == 1:
        return _solve(options[0], bindings, casts)
    for option in options:
        tried, looked_through = dict(bindings), list(casts)
        if _solve(option, tried, looked_through):
            bindings.update(tried)
            casts[:] = looked_through
            return True
    return False


def _push(wanted: Sequence[Any], found: Sequence[Any], user: fx.Node, rest: Tasks) -> Tasks:
    for index in range(len(wanted) - 1, -1, -1):
        rest = (wanted[index], found[index], user, rest)
    return rest


def _could_be(calls: Sequence[tuple[int, Call]], given: Sequence[Any]) -> bool:
    """Whether the ops of arguments alone could be those of the calls wanted in their places."""
    for place, call in calls:
        node = given[place]
        while isinstance(node, fx.Node) and is_cast(node):
            node = node.args[0]
        if not isinstance(node, fx.Node) or op_name(node) not in call.names:
            return False
    return True


def arguments_of(node: fx.Node, count: int) -> Sequence[Any]:
    """The first `count` arguments by position, wherever they were given by name; `MISSING` for those left out."""
    if len(node.args) >= count or not isinstance(node.target, torch._ops.OpOverload):
        return (*node.args[:count], *([MISSING] * (count - len(node.args))))
    names = [argument.name for argument in node.target._schema.arguments[:count]]
    given = [*node.args, *(node.kwargs.get(name, MISSING) for name in names[len(node.args) :])]
    return (*given, *([MISSING] * (count - len(given))))


def given_beyond(node: fx.Node, count: int) -> str:
    """The first argument after `count` positional ones that is not its default: `alpha=2`."""
    if not isinstance(node.target, torch._ops.OpOverload) or (len(node.args) <= count and not node.kwargs):
        return ""
    for index, argument in enumerate(node.target._schema.arguments):
        default = argument.default_value
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, default)
        if index >= count and given is not default and given != default:
            return f"{argument.name}={given}"
    return ""


def equal(wanted: Any, found: Any, user: fx.Node) -> bool:
    """Whether an argument is what a pattern says in numbers."""
    if isinstance(wanted, LastAxis):
        axis = found[0] if isinstance(found, list | tuple) and len(found) == 1 else found
        return axis == -1 or (isinstance(axis, int) and axis == _rank(user) - 1)
    if isinstance(wanted, bool) or isinstance(found, bool):
        return found is wanted
    if isinstance(wanted, float) and isinstance(found, float):
        return math.isclose(wanted, found, rel_tol=1e-9)
    return bool(found == wanted)


def _rank(user: fx.Node) -> int:
    """Dims of a call's first argument."""
    first = user.args[0][0] if isinstance(user.args[0], list | tuple) else user.args[0]
    value = first.meta.get("val") if isinstance(first, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else -1
