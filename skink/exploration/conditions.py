"""Conditions on the points of a space, as `len(layers) * len(tensors) <= 14 and rank < 64`.

A small part of Python's expressions, checked before it is evaluated: nothing else can be called, looked up or indexed.
"""

import ast
from collections.abc import Callable, Mapping
from typing import Any

from skink.errors import SpaceError, suggest

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "all": all, "any": any, "len": len, "max": max, "min": min, "sum": sum,
}  # fmt: skip
_ALLOWED = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.Eq, ast.NotEq, ast.Lt,
    ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod,
    ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple, ast.Call,
)  # fmt: skip


def read_condition(where: str, text: str, axes: tuple[str, ...]) -> Callable[[Mapping[str, Any]], bool]:
    """A condition as a function of a point's values.

    Args:
        where: the space and family, for messages.
        text: comparisons, `and`, `or`, `not`, `in`, arithmetic, lists, and abs, all, any, len, max, min, sum.
        axes: the names that may stand in it.

    Raises:
        SpaceError: SPACE-002, at once for what is no such expression, and from the function where types do not fit.
    """
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError) as error:
        raise _refused(where, text, f"it is not an expression: {error}.") from error
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED) or (isinstance(node, ast.Call) and not isinstance(node.func, ast.Name)):
            raise _refused(where, text, f"{ast.unparse(node)!r} is not allowed in a condition.")
        if isinstance(node, ast.Name):
            valid = tuple(_FUNCTIONS) if id(node) in called else axes
            if node.id not in valid:
                raise _refused(where, text, f"{node.id!r} is not known here.", suggest(node.id, valid))
    code = compile(tree, "<where>", "eval")

    def holds(values: Mapping[str, Any]) -> bool:
        try:
            return bool(eval(code, {"__builtins__": {}}, {**_FUNCTIONS, **values}))
        except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
            raise _refused(where, text, f"{type(error).__name__}: {error}, at {dict(values)}.") from error

    return holds


def _refused(where: str, text: str, why: str, fix: str = "") -> SpaceError:
    fix = fix or "write comparisons of axes, as: len(layers) <= 2 and rank < 8."
    return SpaceError("SPACE-002", f"the condition {text!r} cannot be used.", where=where, why=why, fix=fix)
