"""`skink::attention` on the CPU: the C++ kernel for a few new tokens, PyTorch's for many.

The C++ kernel streams the cache once for all the query heads that share it, which is what decoding needs. A long
prompt is limited by arithmetic instead, and there PyTorch's blocked matrix products win; benchmarks/cpu/kernels.py
prints both.
"""

import torch
from torch import Tensor

from skink.kernels.attention.torch_impl import attention as blocked
from skink.kernels.cpp.library import library

# More new tokens than this go to PyTorch, by dtype. Measured by benchmarks/cpu/kernels.py; in bfloat16 PyTorch has
# matrix units to use, and wins sooner.
FEW_TOKENS = {torch.float32: 16, torch.float16: 16, torch.bfloat16: 8}

library()
_streaming = torch.ops.skink_cpp.attention.default


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
) -> Tensor:
    """As the reference."""
    if query.shape[2] <= FEW_TOKENS[query.dtype] or softcap or sinks is not None:
        options = {"causal": causal, "scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
        result: Tensor = _streaming(query, key, value, key_mask, **options, alibi=alibi)
        return result
    return blocked(query, key, value, key_mask, causal=causal, scale=scale, window=window, alibi=alibi)
