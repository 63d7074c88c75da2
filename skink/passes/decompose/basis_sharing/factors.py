"""One basis for the weights of several layers: numbers only, no graphs.

    W_i ~ A_i B      W_i: [out, in] of layer i, B: [K, in], one for all, A_i: [out, K]

The basis is that of the best approximation of the weights laid on top of each other, in the metrics of `factorize`:

    min over B of  sum over i of tr(G_i (W_i - A_i B) C (W_i - A_i B)^T),      C = sum over i of C_i

With G_i = I that is Basis Sharing (Wang et al. 2024, arXiv 2410.03765, section 3): whiten with the summed C, one SVD,
the basis to all and the rest to each. Coefficients are then the best for the basis under each layer's own C_i, or, as
in the paper, under the summed C:

    A_i = W_i C_i B^T (B C_i B^T)^-1

With B C_i B^T = T T^T (Cholesky), the first r rows of Z_i = T^-1 B C_i W_i^T give the coefficients of the first r rows
of the basis, and the error that rank r leaves is tr(G_i W_i C_i W_i^T) less the sum over j <= r of z_j G_i z_j^T: one
decomposition prices all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skink.passes.decompose.factorize.eigen import leading
from skink.passes.decompose.factorize.metric import DAMPING, MORE_DAMPING, Metric


@dataclass(frozen=True)
class Coefficients:
    """What one layer takes of a shared basis, at every rank up to K.

    Args:
        lower: T, float64[K, K].
        rows: Z, float64[K, out].
        discarded: float64[K + 1], at [r] the energy tr(G (W - A_r B_r) C (W - A_r B_r)^T), C damped; non-increasing.
    """

    lower: Tensor
    rows: Tensor
    discarded: Tensor

    def at(self, rank: int) -> Tensor:
        """A_r: float64[out, rank]."""
        root = self.lower[:rank, :rank]
        solved: Tensor = torch.linalg.solve_triangular(root.mT, self.rows[:rank], upper=True)
        return solved.mT


def shared_rank(keep: float, layers: int, out_features: int, in_features: int) -> int:
    """The largest rank whose basis and coefficients hold at most the share `keep` of the layers' parameters.

    K = floor(n g m keep / (n + g m)) with g layers of m x n (Wang et al. 2024, section 3.3).
    """
    stacked = layers * out_features
    return int(keep * stacked * in_features / (stacked + in_features) + 1e-9)


def shared_basis(
    weights: Sequence[Tensor],
    inputs: Tensor,
    outputs: Sequence[Tensor | None],
    *,
    rank: int | None = None,
    output_damping: float = DAMPING,
) -> Tensor:
    """The basis B: float64[K, in], rows of length 1, most important first.

    Args:
        weights: of one shape [out, in], finite.
        inputs: C, float64[in, in]: the sum over the layers.
        outputs: G_i of each layer, float64[out, out]; None: the identity.
        rank: K; None: all that there are.
        output_damping: added to each G_i's diagonal, as a share of its mean.
    """
    stacked = sum(weight.shape[0] for weight in weights)
    most = min(stacked, inputs.shape[0]) if rank is None else rank
    exact = [weight.double() for weight in weights]
    for more in (0.0, *MORE_DAMPING):
        c = Metric(inputs, max(DAMPING, more))
        metrics = [Metric(one, max(output_damping, more)) for one in outputs]
        if c.is_zero or all(metric.is_zero for metric in metrics):
            break
        try:
            basis = _inner(exact, metrics, c, most) if inputs.shape[0] < stacked else _outer(exact, metrics, c, most)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        return _unit(basis)
    identity = Metric(None)
    return _unit(_inner(exact, [identity] * len(exact), identity, most))


def coefficients(weight: Tensor, basis: Tensor, inputs: Tensor, output: Tensor | None) -> Coefficients:
    """The best coefficients of one layer for a basis.

    Args:
        weight: [out, in].
        basis: float64[K, in].
        inputs: C, float64[in, in].
        output: G, float64[out, out]; None: the identity. It does not change the coefficients, only the energy.
    """
    exact = weight.double()
    # The last is the identity, of use where no input was ever anything but zero.
    for c in (*(Metric(inputs, share) for share in (DAMPING, *MORE_DAMPING)), Metric(None)):
        mapped = c.times(basis.mT)
        lower, info = torch.linalg.cholesky_ex(basis @ mapped)
        if not int(info):
            break
    rows = torch.linalg.solve_triangular(lower, mapped.mT @ exact.mT, upper=False)
    g = Metric(output, 0.0)
    explained = (g.times(rows.mT).mT * rows).sum(1).cumsum(0)
    total = (g.times(exact) * c.times(exact.mT).mT).sum()
    discarded = torch.cat((total[None], total - explained)).clamp(min=0)
    return Coefficients(lower, rows, discarded)


def _inner(weights: Sequence[Tensor], outputs: Sequence[Metric], inputs: Metric, rank: int) -> Tensor:
    gram = torch.zeros(weights[0].shape[1], weights[0].shape[1], dtype=torch.float64, device=weights[0].device)
    for weight, output in zip(weights, outputs, strict=True):
        mapped = inputs.through_root(weight)
        gram.addmm_(mapped.mT, output.times(mapped))
    _, vectors = leading(gram, rank)
    return inputs.back_through_root(vectors.mT)


def _outer(weights: Sequence[Tensor], outputs: Sequence[Metric], inputs: Metric, rank: int) -> Tensor:
    mapped = torch.cat([output.through_root(one.mT).mT for one, output in zip(weights, outputs, strict=True)])
    _, vectors = leading(mapped @ inputs.times(mapped.mT), rank)
    return vectors.mT @ mapped


def _unit(rows: Tensor) -> Tensor:
    lengths: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / lengths.clamp(min=torch.finfo(torch.float64).tiny)
