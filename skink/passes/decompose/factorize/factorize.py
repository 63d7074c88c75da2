"""A weight as the product of two thin ones, W ~ up @ down, best at every rank at once: numbers only, no graphs.

One problem serves the whole family. G says what an error at the layer's output costs, C what the layer's inputs are:

    min over rank(W') <= r of  tr(G (W - W') C (W - W')^T) = ||R^T (W - W') L||_F^2        G = R R^T, C = L L^T

| method    | left metric G              | right metric C            | source                                      |
| plain     | identity                   | identity                  | Eckart and Young 1936                       |
| whitened  | identity                   | sum of x x^T              | SVD-LLM 2403.07378, Swift-SVD 2604.01609    |
| asvd      | identity                   | diag(mean abs(x)^2alpha)  | ASVD 2312.05821                             |
| fisher    | diag(sum of (dL/dW)^2)     | identity                  | FWSVD 2207.00112                            |
| two-sided | sum of g g^T               | sum of x x^T              | Kronecker-factored Fisher 1503.05671        |

The optimum is the truncated SVD of R^T W L = U S V^T, mapped back. It has two forms, equal up to rounding, each with
one eigenproblem, and each with the root of one metric only:

    inner   V S^2 V^T = L^T W^T G W L  [in, in]       up = W L V       down = V^T L^-1
    outer   U S^2 U^T = R^T W C W^T R  [out, out]     up = R^-T U      down = U^T R^T W

The outer form is the inner form of W^T with the metrics exchanged. The smaller eigenproblem is taken. With G = I the
inner form is SVD-LLM's whitening, and the outer one theorem 3.1 of Swift-SVD.

Everything is computed in float64. Factors are balanced: component i has as much norm in column i of `up` as in row i of
`down`, which leaves the product alone and is kind to half precision and to training.

A metric is singular where a feature is dead, or where there were fewer tokens than features. A share of its mean
diagonal is added, so that directions without data are kept by their weights' size.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from skink.passes.decompose.factorize.eigen import leading, leading_at_random
from skink.passes.decompose.factorize.metric import DAMPING, MORE_DAMPING, Metric

# Up to this share of the smaller side, what is asked for is found at random: the whole spectrum costs more.
_FEW = 1 / 8
# Rows of a weight that are compared at a time.
_STRIP = 1024

Form = Literal["auto", "inner", "outer"]
Solver = Literal["auto", "exact", "random"]


@dataclass(frozen=True)
class Factorization:
    """The best approximations of a weight [out, in] at every rank up to K, components in order of importance.

    Args:
        up: [out, K], in the weight's dtype.
        down: [K, in], likewise.
        spectrum: float64, singular values of R^T W L, largest first: all min(out, in), or K where found at random.
        discarded: float64[K + 1], at [r] the energy tr(G (W - W_r) C (W - W_r)^T) that rank r leaves out, without the
            damping of G; non-increasing.
        output: float64[K + 1], likewise tr((W - W_r) C (W - W_r)^T), the square of the error of the layer's output.
    """

    up: Tensor
    down: Tensor
    spectrum: Tensor
    discarded: Tensor
    output: Tensor

    @property
    def rank(self) -> int:
        """K, the largest rank that there are factors for."""
        return self.down.shape[0]

    def at(self, rank: int) -> tuple[Tensor, Tensor]:
        """(up, down) at a rank up to K, as tensors of their own."""
        return self.up[:, :rank].clone(memory_format=torch.contiguous_format), self.down[:rank].clone()


def factorize(
    weight: Tensor,
    *,
    left: Tensor | None = None,
    right: Tensor | None = None,
    rank: int | None = None,
    left_damping: float = DAMPING,
    right_damping: float = DAMPING,
    form: Form = "auto",
    solver: Solver = "exact",
) -> Factorization:
    """The best factors of a weight in two metrics, at every rank up to `rank`.

    Args:
        weight: [out, in], finite.
        left: G: float64[out, out], positive semidefinite; its diagonal float64[out]; None: the identity.
        right: C: float64[in, in] or float64[in], likewise.
        rank: K, 1 to min(out, in); None: min(out, in).
        left_damping: added to G's diagonal, as a share of its mean.
        right_damping: likewise of C.
        form: which of the two equal forms; `auto` takes the one with the smaller eigenproblem.
        solver: `random` finds the first K components only, and nearly; `auto` does so where K is at most an eighth of
            the smaller side.
    """
    most = min(weight.shape) if rank is None else rank
    inner = weight.shape[1] < weight.shape[0] if form == "auto" else form == "inner"
    few = most <= _FEW * min(weight.shape) if solver == "auto" else solver == "random"
    # Where all that gives no metric, or the eigensolver gives up, the plain SVD is left.
    for more in (0.0, *MORE_DAMPING):
        g, c = Metric(left, max(left_damping, more)), Metric(right, max(right_damping, more))
        if g.is_zero or c.is_zero:
            break
        try:
            found = _inner(weight, g, c, most, few=few) if inner else _outer(weight, g, c, most, few=few)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        whole = most == min(weight.shape)
        loss, all_loss = found.values[:most] - g.shift * found.output, found.all_values - g.shift * found.all_output
        return _factorization(
            weight,
            found,
            discarded=_tails(loss.clamp(min=0), all_loss, whole=whole),
            output=_tails(found.output, found.all_output, whole=whole),
        )
    plainly = Metric(None)
    found = _inner(weight, plainly, plainly, most, few=few)
    return _factorization(
        weight,
        found,
        discarded=truncation_energy(weight, found.up, found.down, left=left, right=right),
        output=truncation_energy(weight, found.up, found.down, right=right),
    )


def truncation_energy(
    weight: Tensor, up: Tensor, down: Tensor, *, left: Tensor | None = None, right: Tensor | None = None
) -> Tensor:
    """What each rank of any factors leaves out: tr(G (W - W_r) C (W - W_r)^T), W_r = up[:, :r] @ down[:r].

    Args:
        weight: [out, in].
        up: [out, K].
        down: [K, in].
        left: G, as of `factorize`, without damping.
        right: C, likewise.

    Returns:
        float64[K + 1].
    """
    g, c = Metric(left), Metric(right)
    exact, up, down = weight.double(), up.double(), down.double()
    mapped = c.times(exact.mT).mT
    costly = g.times(up)
    single = ((costly.mT @ mapped) * down).sum(1)
    pairs = (up.mT @ costly) * (down @ c.times(down.mT))
    total = (g.times(exact) * mapped).sum()
    first_pairs = pairs.cumsum(0).cumsum(1).diagonal()
    return torch.cat((total[None], total - 2 * single.cumsum(0) + first_pairs)).clamp(min=0)


def plain_truncation_energy(weight: Tensor, right: Tensor, rank: int) -> Tensor:
    """tr((W - W_r) C (W - W_r)^T) of the plain truncated SVD, for every r up to `rank`: float64[rank + 1]."""
    found = factorize(weight.double(), rank=rank)
    c = Metric(right)
    # The columns of `up` are orthogonal, so the energies of components add up.
    energies = found.up.square().sum(0) * (found.down * c.times(found.down.mT).mT).sum(1)
    exact = weight.double()
    return _tails(energies, (exact * c.times(exact.mT).mT).sum(), whole=rank == min(weight.shape))


def error_energy(difference: Tensor, *, left: Tensor | None = None, right: Tensor | None = None) -> float:
    """tr(G D C D^T) of one difference D: float64[out, in]; metrics as of `factorize`, without damping."""
    return max(0.0, float((Metric(left).times(difference) * Metric(right).times(difference.mT).mT).sum()))


def output_error(weight: Tensor, other: Tensor, covariance: Tensor) -> float:
    """||X (weight - other)^T||_F / ||X weight^T||_F from C = X^T X: float64[in, in]; 0 where the output is zero."""
    exact = weight.double()
    total = error_energy(exact, right=covariance)
    return math.sqrt(error_energy(exact - other.double(), right=covariance) / total) if total > 0 else 0.0


def weight_error(weight: Tensor, up: Tensor, down: Tensor) -> float:
    """||W - up @ down||_F / ||W||_F of the factors as they are, rounding included; 0 where the weight is zero."""
    right, total, error = down.double(), 0.0, 0.0
    # A strip of rows at a time: the product in float64 would be the largest tensor of all.
    for rows, factor in zip(weight.split(_STRIP), up.split(_STRIP), strict=True):
        exact = rows.double()
        total += float(exact.square().sum())
        error += float((exact - factor.double() @ right).square().sum())
    return math.sqrt(error / total) if total > 0 else 0.0


def relative(energy: Tensor, rank: int) -> float:
    """The relative error of truncation at `rank`: sqrt(energy left out / all energy); 0 where there is none."""
    total = float(energy[0])
    return math.sqrt(float(energy[rank]) / total) if total > 0 else 0.0


def uniform_rank(keep: float, out_features: int, in_features: int) -> int:
    """The largest rank whose factors hold at most the share `keep` of a weight's parameters."""
    # The last term keeps 0.6 * 10000 / 200 from being 29.999999999999996.
    return math.floor(keep * out_features * in_features / (out_features + in_features) + 1e-9)


@dataclass(frozen=True)
class _Components:
    """Components of the optimum, largest first, and how much each counts.

    Args:
        values: squares of singular values, as many as were found; `all_values` is the sum of all there are.
        up: [out, K], `down`: [K, in].
        output: [K], energies under the right metric alone; `all_output` is the sum of all there are.
    """

    values: Tensor
    all_values: Tensor
    up: Tensor
    down: Tensor
    output: Tensor
    all_output: Tensor


def _inner(weight: Tensor, left: Metric, right: Metric, rank: int, *, few: bool) -> _Components:
    # In float64 only here, so that there is one such copy of the weight and not two.
    mapped = right.through_root(weight.double())
    gram = mapped.mT @ left.times(mapped)
    values, vectors = _leading(gram, rank, few=few)
    up = mapped @ vectors
    # Rows of `down` are orthonormal under the right metric.
    return _Components(
        values=values,
        all_values=gram.trace(),
        up=up,
        down=right.back_through_root(vectors.mT),
        output=torch.linalg.vector_norm(up, dim=0).square(),
        all_output=torch.linalg.vector_norm(mapped).square(),
    )


def _outer(weight: Tensor, left: Metric, right: Metric, rank: int, *, few: bool) -> _Components:
    mapped = left.through_root(weight.double().mT).mT
    gram = mapped @ right.times(mapped.mT)
    values, vectors = _leading(gram, rank, few=few)
    up = left.back_through_root(vectors.mT).mT
    # Rows of `down` have the squared lengths `values` under the right metric.
    return _Components(
        values=values,
        all_values=gram.trace(),
        up=up,
        down=vectors.mT @ mapped,
        output=values[:rank] * torch.linalg.vector_norm(up, dim=0).square(),
        all_output=left.back_through_root(left.back_through_root(gram).mT).trace(),
    )


def _leading(gram: Tensor, rank: int, *, few: bool) -> tuple[Tensor, Tensor]:
    values, vectors = leading_at_random(gram, rank) if few else leading(gram, rank)
    return values.clamp(min=0), vectors


def _tails(energies: Tensor, total: Tensor, *, whole: bool) -> Tensor:
    """What each rank up to K leaves out, of components' energies [K] that are all there are, or part of a total."""
    rest = total.new_zeros(1) if whole else (total - energies.sum()).clamp(min=0)[None]
    return torch.cat((energies, rest)).flip(0).cumsum(0).flip(0)


def _factorization(weight: Tensor, found: _Components, *, discarded: Tensor, output: Tensor) -> Factorization:
    up_norms, down_norms = found.up.norm(dim=0), found.down.norm(dim=1)
    ratio = torch.where(up_norms * down_norms > 0, (down_norms / up_norms).sqrt(), 1.0)
    return Factorization(
        up=(found.up * ratio).to(weight.dtype).contiguous(),
        down=(found.down / ratio[:, None]).to(weight.dtype).contiguous(),
        spectrum=found.values[: min(weight.shape)].sqrt(),
        discarded=discarded,
        output=output,
    )
