"""Where the tokens of a value lie: one axis of it, alone or flattened with others.

An axis of size `outer * T * inner` holds token `(i // inner) % T` at index `i`: [B, T, E] reshaped to [B*T, E] has its
tokens on axis 0 with `outer` B, and [B*T*2, E], where each token takes two rows, has `inner` 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch

ONE = sympy.Integer(1)


@dataclass(frozen=True)
class TokenAxis:
    """The axis of a value that holds its tokens; see the module."""

    index: int
    outer: sympy.Expr = ONE
    inner: sympy.Expr = ONE

    def at(self, index: int) -> "TokenAxis":
        """The same tokens on another axis."""
        return self if index == self.index else TokenAxis(index, self.outer, self.inner)

    @property
    def layout(self) -> tuple[sympy.Expr, sympy.Expr]:
        """How tokens lie within the axis."""
        return self.outer, self.inner


def size_of(size: Any) -> sympy.Expr:
    """A size as an expression over the symbols of the dims."""
    if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        expression: sympy.Expr = size.node.expr
        return expression
    return sympy.Integer(int(size))


def depends_on(size: Any, tokens: sympy.Symbol | None) -> bool:
    """Whether a size, or a number computed from sizes, changes with the number of tokens."""
    symbolic = isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool)
    return symbolic and tokens is not None and tokens in size.node.expr.free_symbols


@lru_cache(maxsize=4096)
def quotient(dividend: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
    """`dividend / divisor` where that is a whole number for every size of the dims, as far as the factors show it."""
    result = dividend / divisor
    coefficient, rest = result.as_coeff_Mul()
    whole = coefficient.is_Integer and all(
        power.is_Integer and power > 0 for base, power in rest.as_powers_dict().items() if base != 1
    )
    return result if whole else None


def product(sizes: Sequence[Any]) -> sympy.Expr:
    """The number of elements of a shape."""
    result: sympy.Expr = ONE
    for size in sizes:
        result = result * size_of(size)
    return result


def reshaped(axis: TokenAxis, before: Sequence[Any], after: Sequence[Any], tokens: sympy.Symbol) -> TokenAxis | None:
    """The token axis of a reshape, which keeps the order of elements; None where tokens and others share an axis.

    A token is `stride` elements in a row, `stride = inner * (what follows the axis)`. It lies on the axis of the result
    whose own elements are a part of that row, and which goes on for a whole number of rounds of T tokens.
    """
    stride = axis.inner * product(before[axis.index + 1 :])
    below: sympy.Expr = ONE
    for index in reversed(range(len(after))):
        above = below * size_of(after[index])
        inner, outer = quotient(stride, below), quotient(above, stride * tokens)
        if inner is not None and outer is not None:
            return TokenAxis(index, outer, inner)
        below = above
    return None


def axis_in_shape(shape: Sequence[Any], tokens: sympy.Symbol) -> TokenAxis | None:
    """The one axis of a shape that holds tokens, T of them or a multiple; None where there is none, or several."""
    found = [index for index, size in enumerate(shape) if depends_on(size, tokens)]
    if len(found) != 1:
        return None
    outer = quotient(size_of(shape[found[0]]), tokens)
    return TokenAxis(found[0], outer) if outer is not None and tokens not in outer.free_symbols else None


def fits(axis: TokenAxis | None, shape: Sequence[Any], tokens: sympy.Symbol) -> bool:
    """Whether a shape has its tokens on `axis` and nowhere else."""
    for index, size in enumerate(shape):
        if axis is not None and index == axis.index:
            if size_of(size) != axis.outer * tokens * axis.inner:
                return False
        elif depends_on(size, tokens):
            return False
    return axis is None or axis.index < len(shape)
