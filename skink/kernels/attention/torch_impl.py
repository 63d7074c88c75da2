"""`skink::attention` on PyTorch's `scaled_dot_product_attention`, for prefill on the CPU and for GPUs."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from skink.kernels.attention.reference import allowed_keys, distances


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
    """As the reference; `softcap` and `sinks` must be unset (`supports` refuses them)."""
    length, keys = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    window = window if window < keys else 0
    if key_mask is None and not window and alibi is None and (not causal or length == 1 or length == keys):
        return scaled_dot_product_attention(
            query, key, value, is_causal=causal and length > 1, scale=scale, enable_gqa=grouped
        )
    allowed = allowed_keys(length, keys, key_mask, causal=causal and length > 1, window=window, device=query.device)
    blind = None
    if allowed is not None and key_mask is not None:
        # A query in left padding sees nothing, and a row without a key is not a number: let it see every key, and all
        # alike, as in the reference.
        blind = ~allowed.any(-1, keepdim=True)  # [B, 1, T, 1]
        allowed, query = allowed | blind, query.masked_fill(blind, 0.0)
    if alibi is not None:
        # One mask for both what is seen and what its score gains: float[B or 1, H, T, S].
        bias = (
            alibi.to(torch.promote_types(query.dtype, torch.float32)).view(-1, 1, 1)
            * distances(length, keys, device=query.device)
        )[None]
        bias = bias if blind is None else bias.masked_fill(blind, 0.0)
        allowed = (bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)).to(query.dtype)
    return scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale, enable_gqa=grouped)
