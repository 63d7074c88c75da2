"""A positive semidefinite matrix that the error of a weight is measured in, with its Cholesky factor."""

import torch
from torch import Tensor

# Added to a metric's diagonal, as a share of its mean; and, in turn, where rounding made it indefinite all the same.
DAMPING = 1e-8
MORE_DAMPING = (1e-6, 1e-4, 1e-2)


class Metric:
    """M + shift I, where M is the identity, a diagonal or a full matrix.

    Args:
        matrix: float64[k, k], its diagonal float64[k], or None: the identity. It is not changed.
        damping: the shift, as a share of M's mean diagonal; the identity has none.
    """

    def __init__(self, matrix: Tensor | None, damping: float = 0.0) -> None:
        self.matrix = matrix
        self.shift = 0.0 if matrix is None else damping * float(_diagonal(matrix).mean())
        self._lower: Tensor | None = None

    @property
    def is_zero(self) -> bool:
        """Whether it measures nothing."""
        return self.matrix is not None and not bool((_diagonal(self.matrix) > 0).any())

    def times(self, columns: Tensor) -> Tensor:
        """(M + shift I) @ columns, without a copy of M, which may be the largest matrix of all."""
        if self.matrix is None:
            return columns
        if self.matrix.dim() == 1:
            return (self.matrix + self.shift)[:, None] * columns
        product = self.matrix @ columns
        return product.add_(columns, alpha=self.shift) if self.shift else product

    def through_root(self, rows: Tensor) -> Tensor:
        """rows @ L, where L L^T = M + shift I."""
        if self.matrix is None:
            return rows
        return rows * self._root() if self.matrix.dim() == 1 else rows @ self._root()

    def back_through_root(self, rows: Tensor) -> Tensor:
        """rows @ L^-1."""
        if self.matrix is None:
            return rows
        if self.matrix.dim() == 1:
            return rows / self._root()
        solved: Tensor = torch.linalg.solve_triangular(self._root(), rows, upper=False, left=False)
        return solved

    def _root(self) -> Tensor:
        """L, or its diagonal; computed once.

        Raises:
            torch.linalg.LinAlgError: where M + shift I is not positive definite.
        """
        if self._lower is None:
            if self.matrix is None:
                raise RuntimeError("the identity needs no root")
            damped = self.matrix.clone()
            _diagonal(damped).add_(self.shift)
            if damped.dim() == 2:
                self._lower = torch.linalg.cholesky(damped)
            elif bool((damped > 0).all()):
                self._lower = damped.sqrt()
            else:
                raise torch.linalg.LinAlgError("a diagonal metric is not positive")  # type: ignore[attr-defined]
        return self._lower


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal() if matrix.dim() == 2 else matrix
