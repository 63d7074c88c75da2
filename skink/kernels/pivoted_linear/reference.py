"""A linear layer some of whose outputs are linear combinations of the others, as written."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from skink.kernels.pivoted_linear.columns import index_select


def pivoted_linear(
    input: Tensor,
    kept: Tensor,
    rest: Tensor,
    kept_bias: Tensor | None = None,
    rest_bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """`[z, z @ restᵀ + rest_bias][order]` with `z = input @ keptᵀ + kept_bias`.

    Args:
        input: float[..., I].
        kept: float[R, I], in the input's dtype.
        rest: float[S, R], likewise.
        kept_bias: float[R], likewise.
        rest_bias: float[S], likewise.
        order: int64[N], where among the R + S numbers each output is; None: all of them as they stand.

    Returns:
        float[..., N], N = R + S without an order; in the input's dtype. What the second product reads is rounded to
        that dtype here; a kernel may keep it in float32.
    """
    z = linear(input, kept, kept_bias)
    both = torch.cat([z, linear(z, rest, rest_bias)], -1)
    return both if order is None else index_select(both, -1, order)
