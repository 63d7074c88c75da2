"""`skink::pivoted_linear` on the CPU: the C++ kernel for a few tokens, PyTorch's two products for many.

As for `low_rank_linear`, and up to as many rows: the same products in the same loops.
"""

import torch
from torch import Tensor

from skink.kernels.cpp.library import library
from skink.kernels.low_rank_linear.cpu import FEW_ROWS
from skink.kernels.pivoted_linear.reference import pivoted_linear as two_products

library()
_streaming = torch.ops.skink_cpp.pivoted_linear.default


def pivoted_linear(
    input: Tensor,
    kept: Tensor,
    rest: Tensor,
    kept_bias: Tensor | None = None,
    rest_bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """As the reference."""
    rows = input.numel() // max(1, input.shape[-1])
    if rows <= FEW_ROWS[input.dtype]:
        result: Tensor = _streaming(input, kept, rest, kept_bias, rest_bias, order)
        return result
    return two_products(input, kept, rest, kept_bias, rest_bias, order)
