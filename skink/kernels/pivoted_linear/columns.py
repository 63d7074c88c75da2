"""Pick columns of a matrix with many rows, quickly."""

from torch import Tensor


def index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    """`input.index_select(dim, index)`; along the last dim as a gather, which for many rows is several times quicker
    on the CPU.

    Args:
        input: any shape.
        dim: along which.
        index: int64[M].

    Returns:
        As the input, with M in place of that dim; gradients flow to `input`.
    """
    if input.dim() == 0 or dim not in (-1, input.dim() - 1):
        return input.index_select(dim, index)
    return input.gather(-1, index.expand(*input.shape[:-1], -1))
