"""A linear layer whose weight is the product of two thin ones, as written."""

from torch import Tensor
from torch.nn.functional import linear


def low_rank_linear(input: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """`(input @ downᵀ) @ upᵀ + bias`.

    Args:
        input: float[..., I].
        down: float[R, I], in the input's dtype.
        up: float[O, R], likewise.
        bias: float[O], likewise.

    Returns:
        float[..., O], in the input's dtype. The vector between the products is rounded to that dtype here; a kernel may
        keep it in float32.
    """
    return linear(linear(input, down), up, bias)
