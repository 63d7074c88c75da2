"""The leading eigenvectors of a positive semidefinite matrix: exactly, or few of them at random."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Eigenproblems up to this size are solved on one thread.
_SMALL = 1024

# More columns than asked for, and rounds of subspace iteration: Halko et al. advise 5 to 10, and 1 or 2 of M M^T.
_OVERSAMPLING = 10
_ROUNDS = 2


def leading(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues of gram [n, n], largest first, and the eigenvectors [n, rank] of the first ones.

    Raises:
        torch.linalg.LinAlgError: where the solver does not converge.
    """
    with _one_thread(gram):
        values, vectors = torch.linalg.eigh(gram)
    return values.flip(0), vectors[:, -rank:].flip(1)


def leading_at_random(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues of gram [n, n] and their eigenvectors [n, rank], nearly.

    A random range finder with subspace iteration, then the small eigenproblem within that range (Halko, Martinsson and
    Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.3). Values are at most the true ones. It draws the same
    numbers at every call.
    """
    generator = torch.Generator().manual_seed(0)
    columns = min(len(gram), rank + _OVERSAMPLING)
    basis = torch.randn(len(gram), columns, dtype=torch.float64, generator=generator).to(gram)
    for _ in range(1 + _ROUNDS):
        basis = torch.linalg.qr(gram @ basis).Q
    values, vectors = leading(basis.mT @ gram @ basis, rank)
    return values[:rank], basis @ vectors


@contextmanager
def _one_thread(matrix: Tensor) -> Iterator[None]:
    """One thread for small matrices on the CPU.

    The solver's threads meet after every few microseconds of work. More of them gain nothing on an idle machine, and on
    a busy one, where one is always missing, they take a hundred times as long.
    """
    threads = torch.get_num_threads()
    if matrix.device.type == "cpu" and len(matrix) <= _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
