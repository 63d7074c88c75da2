"""Root-mean-square normalisation, as written (Zhang & Sennrich 2019, arXiv 1910.07467, equation 4)."""

import torch
from torch import Tensor


def rms_norm(input: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """`input / sqrt(mean(input²) + eps) * (offset + weight)` over the last axis.

    Args:
        input: float[..., E]; computed in float32 (float64 stays float64) and returned in its own dtype.
        weight: float[E], or None for no scaling.
        eps: added to the mean square, > 0.
        offset: 1.0 for families that store the weight less one (Gemma).
    """
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        normalised = normalised * (weight.to(wide.dtype) + offset)
    return normalised.to(input.dtype)
