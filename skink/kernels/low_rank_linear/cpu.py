"""`skink::low_rank_linear` on the CPU: the C++ kernel for a few tokens, PyTorch's two products for many.

The C++ kernel reads each weight from memory once, which is what limits decoding. With more tokens arithmetic does, and
there PyTorch's blocked products win; benchmarks/cpu/low_rank_linear.py prints both.
"""

import torch
from torch import Tensor

from skink.kernels.cpp.library import library
from skink.kernels.low_rank_linear.reference import low_rank_linear as two_products

# More rows than this go to PyTorch, by dtype. Measured by benchmarks/cpu/low_rank_linear.py; in bfloat16 PyTorch has
# matrix units to use, and wins sooner.
FEW_ROWS = {torch.float32: 16, torch.float16: 16, torch.bfloat16: 6}

library()
_streaming = torch.ops.skink_cpp.low_rank_linear.default


def low_rank_linear(input: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """As the reference."""
    rows = input.numel() // max(1, input.shape[-1])
    if rows <= FEW_ROWS[input.dtype]:
        result: Tensor = _streaming(input, down, up, bias)
        return result
    return two_products(input, down, up, bias)
