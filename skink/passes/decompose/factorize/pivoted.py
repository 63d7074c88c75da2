"""A product of two thin matrices with some of its own rows as one factor, which takes R^2 numbers less.

    P = up @ down, rank R:   kept = P[pivots] [R, in],   P[others] = rest @ kept,   rest = up[others] up[pivots]^-1

R (out + in - R) numbers, which is fewer than out * in at every rank below both: no rank is past a break-even. Source:
Pivoting Factorization (arXiv 2501.19090). Pivots are chosen so that no number of `rest` is large, and what rounding
does to `kept` does not grow on its way through: rows by Gaussian elimination with pivoting, then exchanged while that
enlarges their determinant (Goreinov et al. 2010, "How to find a good submatrix").
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows are exchanged while a number of `rest` is larger than this.
_LARGEST = 2.0


@dataclass(frozen=True)
class Pivoted:
    """A matrix [out, in] of rank R < out by R of its rows, and the others as combinations of them.

    Args:
        kept: [R, in].
        rest: [out - R, R].
        pivots: int64[R], ascending: which rows `kept` are.
        others: int64[out - R], ascending.
    """

    kept: Tensor
    rest: Tensor
    pivots: Tensor
    others: Tensor

    @property
    def order(self) -> Tensor:
        """int64[out]: where each row of the matrix is in [kept; rest @ kept]."""
        return torch.cat((self.pivots, self.others)).argsort()

    @property
    def numbers(self) -> int:
        """How many numbers it takes."""
        return self.kept.numel() + self.rest.numel()

    def product(self) -> Tensor:
        """The matrix: float64[out, in]."""
        kept = self.kept.double()
        return torch.cat((kept, self.rest.double() @ kept))[self.order]


def pivoted(up: Tensor, down: Tensor) -> Pivoted:
    """The pivoted form of up [out, R] @ down [R, in], R < out, in the dtype of `up`."""
    exact = up.double()
    # An orthonormal basis of the same columns gives the same `rest`, and more precisely.
    basis = torch.linalg.qr(exact).Q
    pivots = _good_rows(basis).sort().values
    free = torch.ones(len(up), dtype=torch.bool, device=up.device)
    free[pivots] = False
    others = free.nonzero().flatten()
    rest = torch.linalg.solve(basis[pivots], basis[others], left=False)
    kept = exact[pivots] @ down.double()
    return Pivoted(kept.to(up.dtype), rest.to(up.dtype), pivots, others)


def _good_rows(basis: Tensor) -> Tensor:
    """Which R rows of basis [out, R] all others are small combinations of: int64[R]."""
    rank = basis.shape[1]
    factors, swaps = torch.linalg.lu_factor(basis)
    rows = torch.arange(len(basis))
    for place, other in enumerate((swaps - 1).tolist()):
        rows[[place, other]] = rows[[other, place]]
    rows = rows.to(basis.device)
    lower = factors.tril(-1)
    rest = torch.linalg.solve_triangular(lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True)
    # Each exchange multiplies the determinant by more than _LARGEST, so there are few; the bound is for safety.
    for _ in range(4 * len(basis)):
        place = int(rest.abs().argmax())
        row, column = divmod(place, rank)
        value = float(rest[row, column])
        if abs(value) <= _LARGEST:
            break
        change = rest[row].clone()
        change[column] -= 1.0
        rest -= torch.outer(rest[:, column], change / value)
        rest[row] = -change / value
        rest[row, column] += 1.0
        rows[[column, rank + row]] = rows[[rank + row, column]]
    return rows[:rank]
