"""Tucker's decomposition of a tensor, and a product of two matrices in Tucker's form: numbers only, no graphs.

    T ~ core x_1 U_1 x_2 U_2 ...        U_n: [size_n, R_n], orthonormal columns; core: the tensor with sizes R_n

The factor of a mode begins as the first singular vectors of the tensor unfolded along that mode (HOSVD: De Lathauwer et
al. 2000). That is near the best, not the best; iterations that solve for one factor with the others held (HOOI: the
same authors) lower the error until it stays. A matrix has two modes, and there HOSVD with equal ranks is the truncated
SVD, with a diagonal core.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skink.passes.decompose.factorize.eigen import leading


@dataclass(frozen=True)
class Tucker:
    """A tensor in Tucker's form, in float64.

    Args:
        core: float64[R_1, R_2, ...]; a mode that was left whole has its full size.
        factors: float64[size_n, R_n] of each mode, None for those left whole.
    """

    core: Tensor
    factors: tuple[Tensor | None, ...]

    def tensor(self) -> Tensor:
        """The tensor that it stands for."""
        whole = self.core
        for mode, factor in enumerate(self.factors):
            if factor is not None:
                whole = _along(whole, mode, factor)
        return whole


def tucker(tensor: Tensor, ranks: Sequence[int | None], *, iterations: int = 0) -> Tucker:
    """The Tucker form of a tensor at the given ranks.

    Args:
        tensor: of any shape.
        ranks: of each mode, 1 to its size; None leaves the mode whole.
        iterations: of HOOI, after HOSVD. None of them raises the error.
    """
    exact = tensor.double()
    modes = [mode for mode, rank in enumerate(ranks) if rank is not None]
    factors: list[Tensor | None] = [
        _basis(exact, mode, rank) if rank is not None else None for mode, rank in enumerate(ranks)
    ]
    for _ in range(iterations):
        for mode in modes:
            others = [factor if other != mode else None for other, factor in enumerate(factors)]
            factors[mode] = _basis(_projected(exact, others), mode, factors[mode].shape[1])  # type: ignore[union-attr]
    return Tucker(_projected(exact, factors), tuple(factors))


def three_factors(up: Tensor, down: Tensor, rank_out: int, rank_in: int) -> tuple[Tensor, Tensor, Tensor]:
    """A product up @ down in Tucker's form: (U_1 [out, rank_out], core [rank_out, rank_in], U_2^T [rank_in, in]).

    U_1 and U_2 have orthonormal columns. The three multiply to the product of the first min(rank_out, rank_in)
    components, whichever of the ranks is larger: a matrix has no use for more. Of an SVD the core is diagonal, the
    singular values but for their signs.

    Args:
        up: [out, R], components in order of importance.
        down: [R, in], likewise.
        rank_out: 1 to min(R, out).
        rank_in: 1 to min(R, in).
    """
    least = min(rank_out, rank_in)
    first, left = torch.linalg.qr(up.double()[:, :rank_out])
    last, right = torch.linalg.qr(down.double()[:rank_in].mT)
    return first, left[:, :least] @ right[:, :least].mT, last.mT


def relative_error(tensor: Tensor, other: Tensor) -> float:
    """||tensor - other|| / ||tensor||, both float64; 0 where the tensor is zero."""
    norm = float(tensor.norm())
    return float((tensor - other).norm()) / norm if norm > 0 else 0.0


def _basis(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """The first left singular vectors of the tensor unfolded along a mode."""
    unfolded = tensor.movedim(mode, 0).flatten(1)
    return leading(unfolded @ unfolded.mT, rank)[1]


def _projected(tensor: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    for mode, factor in enumerate(factors):
        if factor is not None:
            tensor = _along(tensor, mode, factor.mT)
    return tensor


def _along(tensor: Tensor, mode: int, matrix: Tensor) -> Tensor:
    """The tensor with `matrix` applied along one mode: its size there becomes the matrix's rows."""
    applied: Tensor = torch.tensordot(matrix, tensor, dims=([1], [mode]))
    return applied.movedim(0, mode)
