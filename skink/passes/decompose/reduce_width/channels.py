"""Which inner channels of a pair of weights stay, the price of each width, and how the second weight makes up for it.

Numbers only, no graphs. The first weight of the pair makes channels h [n], the second reads them, y = W h. With the
channels S alone, the best second weight is Nyström's (MoDeGPT, arXiv 2408.09632, theorem 3.2):

    W' = W C S (S^T C S)^-1,   C = mean of h h^T

and the price of it, in nats per token, comes from the gradients at y, Gbar = mean of g g^T (Martens and Grosse 2015):

    1/2 tr(Gbar D C D^T),   D = W - W' S^T

For any order of the channels one Cholesky factor C = L L^T, in that order, gives the prices of all widths: what the
first k channels leave unexplained is spanned by the columns of L from k on, so that the price of width k is the sum
over columns j >= k of 1/2 (W L)_j^T Gbar (W L)_j.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from skink.passes.decompose.factorize.metric import DAMPING, MORE_DAMPING

# Channels eliminated between two updates of the whole matrices.
_BLOCK = 64


def damped(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A PSD matrix float64[n, n] with its diagonal raised until it has a Cholesky factor, and that factor."""
    scale = float(matrix.diagonal().mean())
    for share in (DAMPING, *MORE_DAMPING):
        raised = matrix.clone()
        raised.diagonal().add_(share * scale if scale > 0 else 1.0)
        lower, failed = torch.linalg.cholesky_ex(raised)
        if not failed:
            return raised, lower
    raised = torch.diag(matrix.diagonal().clamp(min=1e-30))
    return raised, raised.sqrt()


def smoothed(gradients: Tensor, share: float) -> Tensor:
    """Gbar with its diagonal raised by a share of its mean: float64[out, out].

    Directions that no calibration token pulled at would be free otherwise.
    """
    raised = gradients.clone()
    raised.diagonal().add_(share * gradients.diagonal().mean())
    return raised


def elimination_order(weight: Tensor, covariance: Tensor, gradients: Tensor | None, *, block: int = _BLOCK) -> Tensor:
    """Channels from the most to the least important, by greedy backward elimination.

    In every step the channel goes whose loss, made up for by those left, raises the price least (Optimal Brain Surgeon,
    Hassibi and Stork 1993, equation 5, with a metric on both sides): with P the inverse of C over the channels left and
    w_j the columns of the second weight as it makes up for those gone,

        price of j = w_j^T Gbar w_j / P_jj,    w_i -= w_j P_ji / P_jj,    P -= P_:j P_j: / P_jj

    Both P and M = W^T Gbar W change by a matrix of low rank, which is added after every `block` channels: O(n^3) in
    all, in products of matrices.

    Args:
        weight: float64[out, n].
        covariance: C, float64[n, n].
        gradients: Gbar, float64[out, out]; None for the identity, which prices the output's squared error.
        block: channels between updates; any number gives the same order.

    Returns:
        int64[n].
    """
    _, lower = damped(covariance)
    inverse = torch.cholesky_inverse(lower)
    price = weight.mT @ (weight if gradients is None else gradients @ weight)
    left = torch.arange(len(covariance))
    gone: list[int] = []
    while len(left):
        count, size = min(block, len(left)), len(left)
        # What is still to be taken off: inverse by u u^T, price by c b^T + b c^T.
        u, b, c = (inverse.new_zeros(size, count) for _ in range(3))
        inverse_diagonal, price_diagonal = inverse.diagonal().clone(), price.diagonal().clone()
        here: list[int] = []
        for step in range(count):
            saliency = price_diagonal.clamp(min=0) / inverse_diagonal.clamp(min=1e-300)
            saliency[here] = torch.inf
            j = int(saliency.argmin())
            row = inverse[j] - u[:, :step] @ u[j, :step]
            pulled = price[j] - c[:, :step] @ b[j, :step] - b[:, :step] @ c[j, :step]
            pivot = row[j].clamp(min=1e-300)
            u[:, step] = row / pivot.sqrt()
            b[:, step] = row / pivot
            c[:, step] = pulled - pulled[j] / 2 * b[:, step]
            inverse_diagonal -= u[:, step].square()
            price_diagonal -= 2 * c[:, step] * b[:, step]
            here.append(j)
        gone += left[here].tolist()
        stays = torch.ones(size, dtype=torch.bool)
        stays[here] = False
        left = left[stays]
        u, b, c = u[stays], b[stays], c[stays]
        inverse = inverse[stays][:, stays] - u @ u.mT
        crossed = c @ b.mT
        price = price[stays][:, stays] - crossed - crossed.mT
    return torch.tensor(gone[::-1], dtype=torch.int64)


def leverage_order(covariance: Tensor) -> Tensor:
    """Channels by ridge leverage score, diag(C (C + r I)^-1), largest first; r is the mean of C's diagonal: int64[n].

    Source: MoDeGPT, algorithm 1.
    """
    ridge = covariance.diagonal().mean().clamp(min=1e-30)
    raised = covariance.clone()
    raised.diagonal().add_(ridge)
    scores = 1 - ridge * torch.cholesky_inverse(torch.linalg.cholesky(raised)).diagonal()
    return scores.argsort(descending=True, stable=True)


def prices(weight: Tensor, covariance: Tensor, gradients: Tensor | None, order: Tensor) -> Tensor:
    """The price of keeping the first k channels of `order`, made up for: float64[n + 1] for k = 0 to n.

    Args:
        weight: float64[out, n].
        covariance: C, float64[n, n], a mean over tokens.
        gradients: Gbar, float64[out, out], likewise; None prices the squared error of the output.
        order: int64[n].
    """
    _, lower = damped(covariance[order][:, order])
    mapped = weight[:, order] @ lower
    columns = (mapped * (mapped if gradients is None else gradients @ mapped)).sum(0).clamp(min=0) / 2
    return torch.cat((columns.flip(0).cumsum(0).flip(0), columns.new_zeros(1)))


def compensated(weight: Tensor, covariance: Tensor, kept: Tensor) -> Tensor:
    """The second weight that reads the channels `kept` alone, W C S (S^T C S)^-1: float64[out, k]."""
    raised, _ = damped(covariance)
    columns = raised[kept]
    _, lower = damped(columns[:, kept])
    return torch.cholesky_solve(columns @ weight.mT, lower).mT


def head_bases(weight: Tensor, covariance: Tensor, gradients: Tensor | None, key_heads: int) -> Tensor:
    """For each value head, directions of its outputs in order of importance, orthonormal rows: float64[Hk, D, D].

    Attention is linear in its values, so that what leaves it, z, may be kept in a basis that is put on the value
    projection. The best one of width r, in the metrics of z and of the loss, are the top eigenvectors V of

        L^T (sum over heads of W_h^T Gbar W_h) L,   mean over heads of C_h = L L^T

    over the query heads that share the value head; V^T L^-1 reads them off z (MoDeGPT's type III, with a metric on the
    left too). Orthonormal rows in nested order span the same, and leave the size of cached values as it was.

    Args:
        weight: of the output projection, float64[out, H, D].
        covariance: of its inputs, float64[H, D, H, D].
        gradients: Gbar, float64[out, out], or None for the identity.
        key_heads: Hk; query heads h H/Hk to (h + 1) H/Hk - 1 share value head h.
    """
    heads = weight.shape[1]
    pulled = weight if gradients is None else torch.einsum("ab,bhd->ahd", gradients, weight)
    bases = []
    for group in torch.arange(heads).chunk(key_heads):
        inside = torch.stack([covariance[h, :, h, :] for h in group.tolist()]).mean(0)
        metric = torch.einsum("ahd,ahe->de", weight[:, group], pulled[:, group])
        _, lower = damped(inside)
        middle = lower.mT @ metric @ lower
        _, vectors = torch.linalg.eigh((middle + middle.mT) / 2)
        readers = torch.linalg.solve_triangular(lower.mT, vectors.flip(1), upper=True)
        bases.append(torch.linalg.qr(readers)[0].mT)
    return torch.stack(bases)


def head_order(heads: int, width: int) -> Tensor:
    """Channels of all heads, [H, D] flattened, the first of every head before the second of any: int64[H * D]."""
    return torch.arange(heads * width).view(heads, width).mT.flatten()


def unit_order(price: Tensor, widths: Sequence[int]) -> Tensor:
    """Units in the order in which they go: int64[U].

    Dropping the units S costs the sum of `price` over S x S. In every step the unit goes that raises the sum least, for
    its width.

    Args:
        price: float64[U, U], symmetric.
        widths: channels of each unit.
    """
    size = torch.tensor(widths, dtype=torch.float64)
    rise = price.diagonal().clone()
    order: list[int] = []
    for _ in widths:
        per_channel = rise / size
        per_channel[order] = torch.inf
        unit = int(per_channel.argmin())
        order.append(unit)
        rise = rise + 2 * price[unit]
    return torch.tensor(order, dtype=torch.int64)
