"""Rotary position embedding, as written (Su et al. 2021, arXiv 2104.09864, equation 34), with ready tables."""

import torch
from torch import Tensor


def rotary(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`input * cos + rotate(input) * sin` on the first R of D features; the rest passes through.

    Args:
        input: float[B, H, T, D].
        cos: float[B or 1, T, R] with R even and R <= D, cast to the input's dtype first (as transformers does).
        sin: as `cos`.
        interleaved: pairs are (0, 1), (2, 3), ... (GPT-J); otherwise (i, i + R/2) (LLaMA).
    """
    width = cos.shape[-1]
    cos, sin = cos.to(input.dtype).unsqueeze(1), sin.to(input.dtype).unsqueeze(1)  # [B, 1, T, R]
    turned = input[..., :width]
    if interleaved:
        rotated = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        rotated = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), dim=-1)
    turned = turned * cos + rotated * sin
    return turned if width == input.shape[-1] else torch.cat((turned, input[..., width:]), dim=-1)
