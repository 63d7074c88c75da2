"""Checks on what a file says, before any of it gets into a graph or into the code that runs one.

They raise `ValueError` or `GraphError`; serialization.py makes GRAPH-001 of both.
"""

import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from skink.errors import GraphError
from skink.graph.program import is_taken

# How deep lists may lie within an operator's arguments, and how large a size may be.
DEEPEST, LARGEST = 8, 2**48

# What generated code calls by these names may be hidden by no input.
RESERVED = frozenset({"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "math", "operator"})


def require(condition: bool, otherwise: str) -> None:
    """Raise ValueError unless the condition holds."""
    if not condition:
        raise ValueError(otherwise)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys are each there once: readers differ in which of two they take."""
    result = dict(pairs)
    require(len(result) == len(pairs), "a key is there twice")
    return result


def as_list(value: Any) -> list[Any]:
    """`value`, where it is a list."""
    require(isinstance(value, list), f"a {type(value).__name__} stands where a list belongs")
    result: list[Any] = value
    return result


def as_text(value: Any) -> str:
    """`value`, where it is text of one line, which may be printed on a terminal."""
    require(isinstance(value, str) and value.isprintable(), f"{value!r} is not text of one line")
    return str(value)


def is_name(value: Any) -> bool:
    """Whether it can name a variable. Letters of other scripts may be read as others, which makes two names one."""
    return isinstance(value, str) and value.isascii() and value.isidentifier() and not keyword.iskeyword(value)


def check_arguments(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Every argument that the operator needs, each once; sizes are computed from numbers alone."""
    if not isinstance(target, torch._ops.OpOverload):
        plain = all(isinstance(arg, fx.Node | int | float) for part in args for arg in _flat(part))
        require(bool(args) and plain, f"{target.__name__} is for numbers")
        return
    schema = target._schema.arguments
    positional = [argument.name for argument in schema if not argument.kwarg_only]
    require(len(args) <= len(positional), f"{target} takes {len(positional)} arguments")
    given = [*positional[: len(args)], *kwargs]
    require(len(set(given)) == len(given), f"an argument of {target} is given twice")
    needed = {argument.name for argument in schema if not argument.has_default_value()}
    require(needed <= set(given), f"{target} lacks an argument")


def _flat(argument: Any) -> list[Any]:
    return list(argument) if isinstance(argument, list | tuple) else [argument]


def as_keyword(target: Callable[..., Any], name: str) -> str:
    """`name`, where it is an argument of the operator: names go into the code that runs the graph."""
    known = isinstance(target, torch._ops.OpOverload) and any(a.name == name for a in target._schema.arguments)
    if not known:
        raise GraphError("GRAPH-001", f"{target} has no argument {name!r}.")
    return name


def as_weight_name(name: str) -> str:
    """`name`, where it is one that a weight can have: names go into the code that runs the graph."""
    if not re.fullmatch(r"(?!__)[\w-]+(\.(?!__)[\w-]+)*", name, flags=re.ASCII) or is_taken(name):
        raise GraphError("GRAPH-001", f"{name!r} is not a weight's name.")
    return name
