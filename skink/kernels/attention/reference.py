"""Softmax attention, as written (Vaswani et al. 2017, equation 1), with what decoders add to it."""

import torch
from torch import Tensor


def distances(query_length: int, key_length: int, *, device: torch.device) -> Tensor:
    """How far each key lies after each query: int64[T, S], of both signs. The queries are the last T of S positions."""
    key = torch.arange(key_length, device=device)[None, :]
    query = torch.arange(query_length, device=device)[:, None] + (key_length - query_length)
    return key - query


def allowed_keys(
    query_length: int,
    key_length: int,
    key_mask: Tensor | None,
    *,
    causal: bool,
    window: int,
    device: torch.device,
) -> Tensor | None:
    """Which key each query may see: bool[B or 1, 1, T, S], or None where every query sees every key.

    The queries are the last T of S positions. Source of the window's edge: Mistral 7B (arXiv 2310.06825, section 2), a
    query sees itself and the `window - 1` keys before it.
    """
    allowed: Tensor | None = None
    if causal or window:
        after = distances(query_length, key_length, device=device)
        if causal:
            allowed = after <= 0
        if window:
            near = after > -window
            allowed = near if allowed is None else allowed & near
    if allowed is not None:
        allowed = allowed[None, None]
    if key_mask is not None:
        # The mask may cover more of the past than the keys do (a ring of the last ones): its tail lines up with them.
        present = key_mask.narrow(1, key_mask.shape[1] - key_length, key_length)[:, None, None, :]
        allowed = present if allowed is None else allowed & present
    return allowed


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
    """`softmax(scale * query @ keyᵀ) @ value`, each group of H/Hk query heads sharing one key and value head.

    Args:
        query: float[B, H, T, D], the last T of S positions.
        key: float[B, Hk, S, D] with Hk dividing H.
        value: float[B, Hk, S, Dv].
        key_mask: bool[B, M], M >= S; False marks padding; the last S columns count.
        causal: a query sees no key after itself.
        scale: factor on the scores, usually D**-0.5.
        window: a query sees itself and the `window - 1` keys before it; 0 for no window.
        softcap: scores become `softcap * tanh(score / softcap)`; 0 for none (Gemma 2, arXiv 2408.00118, section 2).
        sinks: float[H], one more logit in each head's denominator (gpt-oss).
        alibi: float[H] slopes; scores gain `slope * (key position - query position)` (Press et al. 2022, arXiv
            2108.12409, section 3), after the soft cap.

    Returns:
        float[B, H, T, Dv]. The softmax is taken in float32 (float64 stays). A query that may see nothing, as in
        left padding, gets the mean of all values: finite, and never read.
    """
    batch, heads, length, _ = query.shape
    groups = key.shape[1]
    # [B, Hk, H/Hk, T, D] against [B, Hk, 1, S, D]
    grouped = query.unflatten(1, (groups, heads // groups))
    scores = grouped @ key.unsqueeze(2).transpose(-1, -2) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi is not None:
        slopes = alibi.to(scores.dtype).view(groups, heads // groups, 1, 1)
        scores = scores + slopes * distances(length, key.shape[2], device=query.device)
    allowed = allowed_keys(length, key.shape[2], key_mask, causal=causal, window=window, device=query.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed.unsqueeze(1), torch.finfo(scores.dtype).min)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        extra = sinks.to(scores.dtype).view(1, groups, heads // groups, 1, 1).expand(batch, -1, -1, length, 1)
        weights = torch.cat((scores, extra), dim=-1).softmax(-1)[..., :-1]
    result: Tensor = weights.to(value.dtype) @ value.unsqueeze(2)
    return result.flatten(1, 2)
