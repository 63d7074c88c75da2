"""What each op means, written another way than its reference, in float64 and with gradients by autograd.

Sums of exponentials for the softmax, an index for each feature that rotary turns, factors multiplied out, one gathered
weight for each choice of an expert.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
) -> Tensor:
    """As the op; scores must be small enough for their exponentials."""
    batch, heads, queries, _ = query.shape
    keys, each = key.shape[2], heads // key.shape[1]
    key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
    scores = torch.einsum("bhtd,bhsd->bhts", query, key) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    here, there = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None]
    if alibi is not None:
        scores = scores + alibi[None, :, None, None] * (there - here)
    seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    if causal:
        seen = seen & (there <= here)
    if window:
        seen = seen & (there > here - window)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, key_mask.shape[1] - keys :]
    powers = scores.exp() * seen
    total = powers.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[None, :, None, None]
    blind = ~seen.any(-1, keepdim=True)
    weights = powers / total.masked_fill(blind, 1.0)
    if sinks is None:
        weights = weights + blind.to(weights.dtype) / max(keys, 1)
    return torch.einsum("bhts,bhsd->bhtd", weights, value)


def rms_norm(input: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """As the op."""
    normalised = input / (torch.einsum("...e,...e->...", input, input) / input.shape[-1] + eps).sqrt()[..., None]
    return normalised if weight is None else normalised * weight + normalised * offset


def rotary(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """As the op."""
    width = cos.shape[-1]
    features = torch.arange(width)
    if interleaved:
        partner, sign = features ^ 1, features % 2 * 2 - 1
    else:
        partner, sign = (features + width // 2) % width, (features >= width // 2) * 2 - 1
    turned = torch.einsum("bhtr,btr->bhtr", input[..., :width], cos.expand(input.shape[0], -1, -1))
    turned = turned + torch.einsum("bhtr,btr->bhtr", input[..., partner] * sign, sin.expand(input.shape[0], -1, -1))
    return torch.cat([turned, input[..., width:]], -1)


def low_rank_linear(input: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """As the op."""
    result = torch.einsum("...i,oi->...o", input, up @ down)
    return result if bias is None else result + bias


def pivoted_linear(
    input: Tensor,
    kept: Tensor,
    rest: Tensor,
    kept_bias: Tensor | None = None,
    rest_bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """As the op."""
    kept_bias = kept.new_zeros(len(kept)) if kept_bias is None else kept_bias
    rest_bias = kept.new_zeros(len(rest)) if rest_bias is None else rest_bias
    weight = torch.cat([kept, rest @ kept])
    bias = torch.cat([kept_bias, rest @ kept_bias + rest_bias])
    order = torch.arange(len(weight)) if order is None else order
    return torch.einsum("...i,oi->...o", input, weight[order]) + bias[order]


def experts(
    tokens: Tensor,
    chosen: Tensor,
    shares: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float = 0.0,
    alpha: float = 1.0,
    shift: float = 0.0,
) -> Tensor:
    """As the op."""
    if transposed:
        up, down = up.mT, down.mT
    there = (chosen >= 0) & (chosen < len(up))
    chosen = chosen.clamp(0, len(up) - 1)
    hidden = torch.einsum("nkfe,ne->nkf", up[chosen], tokens)
    if up_bias is not None:
        hidden = hidden + up_bias[chosen]
    gate, other = hidden, None
    if gated:
        half = hidden.shape[-1] // 2
        gate, other = (
            (hidden[..., 0::2], hidden[..., 1::2]) if interleaved else (hidden[..., :half], hidden[..., half:])
        )
    if limit:
        gate = torch.where(gate > limit, limit, gate)
        other = None if other is None else torch.where(other.abs() > limit, limit * other.sign(), other)
    active = _ACTIVATIONS[activation](gate, alpha)
    if other is not None:
        active = active * other + active * shift
    results = torch.einsum("nkef,nkf->nke", down[chosen], active)
    if down_bias is not None:
        results = results + down_bias[chosen]
    return torch.einsum("nke,nk->ne", results, shares * there)


_ACTIVATIONS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "silu": lambda x, alpha: x / (1 + torch.exp(-alpha * x)),
    "gelu": lambda x, _: x / 2 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x, _: x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x, _: x * (x > 0),
    "relu2": lambda x, _: x * x * (x > 0),
}

FORMULAS: Mapping[str, Callable[..., Tensor]] = {
    "attention": attention,
    "experts": experts,
    "low_rank_linear": low_rank_linear,
    "pivoted_linear": pivoted_linear,
    "rms_norm": rms_norm,
    "rotary": rotary,
}


def in_float64(arguments: Any) -> Any:
    """Arguments with their floating tensors in float64."""
    if isinstance(arguments, Tensor):
        return arguments.double() if arguments.is_floating_point() else arguments
    if isinstance(arguments, Mapping):
        return {name: in_float64(value) for name, value in arguments.items()}
    if isinstance(arguments, list | tuple):
        return [in_float64(value) for value in arguments]
    return arguments
