"""A weight as the product of two thin ones, W ~ up @ down, best at its rank: numbers only, no graphs.

    plain      min ||W - up @ down||_F                      truncated SVD (Eckart and Young 1936)
    whitened   min ||X W^T - X (up @ down)^T||_F            with C = X^T X of the layer's inputs

The whitened optimum has two forms, equal up to rounding, each one eigendecomposition; the smaller one is taken:

    whitening  C = L L^T, V: top eigenvectors of (W L)^T (W L), up = W L V, down = V^T L^-1      if out > in
               (SVD-LLM, arXiv 2403.07378; V are the right singular vectors of W L)
    output     V: top eigenvectors of W C W^T, up = V, down = V^T W                              otherwise
               (Swift-SVD, arXiv 2604.01609, theorem 3.1)

Everything is computed in float64. Factors are balanced: component i has as much norm in column i of `up` as in row i of
`down`, which leaves the product alone and is kind to half precision and to training.

C is singular where a feature is dead, or where there were fewer tokens than features. `DAMPING` of its mean diagonal is
added, so that directions without data are kept by their weights' size, after all those with data.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DAMPING = 1e-8
# Tried in turn where rounding made C indefinite or the eigensolver gave up; after these, the plain SVD.
_MORE_DAMPING = (1e-6, 1e-4, 1e-2)

# Eigenproblems up to this size are solved on one thread.
_SMALL = 1024

Form = Literal["auto", "whitening", "output"]


@dataclass(frozen=True)
class Factors:
    """Two factors of a weight [out, in], components in order of importance.

    Args:
        up: [out, R], in the weight's dtype.
        down: [R, in], likewise.
        spectrum: float64[min(out, in)], singular values in the metric of the method, largest first. The discarded
            energy is the sum of squares from R on; see `discarded_error`.
        weight_error: ||W - up @ down||_F / ||W||_F, of the factors as they are, rounding included.
        predicted_error: ||X (W - up @ down)^T||_F / ||X W^T||_F, likewise; None without C.
        plain_error: what `plain` would give at the same rank, in the same metric as predicted_error; None without C.
    """

    up: Tensor
    down: Tensor
    spectrum: Tensor
    weight_error: float
    predicted_error: float | None = None
    plain_error: float | None = None


def uniform_rank(keep: float, out_features: int, in_features: int) -> int:
    """The largest rank whose factors hold at most the share `keep` of a weight's parameters."""
    # The last term keeps 0.6 * 10000 / 200 from being 29.999999999999996.
    return math.floor(keep * out_features * in_features / (out_features + in_features) + 1e-9)


def saves(rank: int, shape: tuple[int, int]) -> bool:
    """Whether factors of this rank hold fewer parameters than the weight, by a whole rank's worth at least."""
    return rank < uniform_rank(1.0, *shape)


def discarded_error(spectrum: Tensor, rank: int) -> float:
    """The relative error that truncation at `rank` makes: sqrt(discarded energy / energy)."""
    energy = spectrum.square()
    total = float(energy.sum())
    return math.sqrt(float(energy[rank:].sum()) / total) if total > 0 else 0.0


def output_error(weight: Tensor, other: Tensor, covariance: Tensor) -> float:
    """||X (weight - other)^T||_F / ||X weight^T||_F from C = X^T X: float64[in, in]; 0 where the output is zero."""
    exact = weight.double()
    return _relative(exact - other.double(), covariance, _energy(exact, exact @ covariance))


def plain(weight: Tensor, rank: int) -> Factors:
    """The truncated SVD of a weight [out, in] at `rank`, 1 to min(out, in)."""
    exact = weight.double()
    values, up, down = _plain(exact, rank)
    return _factors(weight, exact, up, down, values)


def whitened(
    weight: Tensor,
    covariance: Tensor,
    rank: int,
    *,
    form: Form = "auto",
    damping: float = DAMPING,
    compare: bool = True,
) -> Factors:
    """The factors that change a layer's output least, on the inputs that C was taken from.

    Args:
        weight: [out, in].
        covariance: C, float64[in, in], on the weight's device; any multiple of it gives the same.
        rank: 1 to min(out, in).
        form: which of the two equal forms; `auto` takes the one with the smaller eigenproblem.
        damping: added to C's diagonal, as a share of its mean.
        compare: whether to compute `plain_error`, which takes about as long again.
    """
    exact = weight.double()
    mapped = exact @ covariance
    total = _energy(exact, mapped)
    found = None
    scale = float(covariance.diagonal().mean())
    tall = weight.shape[0] > weight.shape[1] if form == "auto" else form == "whitening"
    for share in (damping, *(more for more in _MORE_DAMPING if more > damping)):
        if scale <= 0:
            break
        try:
            if tall:
                found = _whitening(exact, covariance, rank, share * scale)
            else:
                found = _output(exact, mapped, rank, share * scale)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        break
    values, up, down = found if found is not None else _plain(exact, rank)
    factors = _factors(weight, exact, up, down, values)
    del mapped
    predicted = _relative(exact - factors.up.double() @ factors.down.double(), covariance, total)
    plain_error = None
    if compare:
        _, up, down = _plain(exact, rank)
        plain_error = _relative(exact - up @ down, covariance, total)
    return Factors(factors.up, factors.down, factors.spectrum, factors.weight_error, predicted, plain_error)


def _whitening(weight: Tensor, covariance: Tensor, rank: int, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    damped = covariance.clone()
    damped.diagonal().add_(damping)
    lower = torch.linalg.cholesky(damped)
    mapped = weight @ lower
    values, vectors = _top(mapped.mT @ mapped, rank)
    down = torch.linalg.solve_triangular(lower, vectors.mT, upper=False, left=False)
    return _spectrum(values, weight), mapped @ vectors, down


def _output(weight: Tensor, mapped: Tensor, rank: int, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    # W (C + damping I) W^T from W C, without a copy of C, which may be the largest matrix of all.
    gram = torch.add(mapped, weight, alpha=damping) @ weight.mT
    values, vectors = _top(gram, rank)
    return _spectrum(values, weight), vectors, vectors.mT @ weight


def _plain(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    if weight.shape[0] > weight.shape[1]:
        values, vectors = _top(weight.mT @ weight, rank)
        return _spectrum(values, weight), weight @ vectors, vectors.mT
    values, vectors = _top(weight @ weight.mT, rank)
    return _spectrum(values, weight), vectors, vectors.mT @ weight


def _top(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues, largest first, and the eigenvectors of the first `rank`."""
    with _one_thread(gram):
        values, vectors = torch.linalg.eigh(gram)
    return values.flip(0), vectors[:, -rank:].flip(1)


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


def _spectrum(values: Tensor, weight: Tensor) -> Tensor:
    """Singular values from eigenvalues, of which there may be more than the weight has singular values."""
    return values.clamp(min=0)[: min(weight.shape)].sqrt()


def _factors(weight: Tensor, exact: Tensor, up: Tensor, down: Tensor, spectrum: Tensor) -> Factors:
    up, down = _balanced(up, down)
    up, down = up.to(weight.dtype), down.to(weight.dtype)
    norm = float(exact.norm())
    error = float((exact - up.double() @ down.double()).norm()) / norm if norm > 0 else 0.0
    return Factors(up.contiguous(), down.contiguous(), spectrum, error)


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    up_norms, down_norms = up.norm(dim=0), down.norm(dim=1)
    product = up_norms * down_norms
    ratio = torch.where(product > 0, (down_norms / up_norms).sqrt(), 1.0)
    return up * ratio, down / ratio[:, None]


def _energy(weight: Tensor, mapped: Tensor) -> float:
    """||X W^T||_F^2 from W and W C."""
    return max(0.0, float(torch.linalg.vecdot(mapped.flatten(), weight.flatten())))


def _relative(difference: Tensor, covariance: Tensor, total: float) -> float:
    return math.sqrt(_energy(difference, difference @ covariance) / total) if total > 0 else 0.0
