"""A mixture of experts, as written (Shazeer et al. 2017, arXiv 1701.06538, equation 1), its router's choice given."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


def activate(
    hidden: Tensor,
    *,
    activation: str,
    gated: bool = True,
    interleaved: bool = False,
    limit: float = 0.0,
    alpha: float = 1.0,
    shift: float = 0.0,
) -> Tensor:
    """What stands between an expert's two products: float[..., 2F] → float[..., F], or [..., F] → [..., F] ungated.

    Computed in float32 (float64 stays) and returned in the input's dtype.
    """
    gate = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    up = None
    if gated:
        gate, up = (gate[..., ::2], gate[..., 1::2]) if interleaved else gate.chunk(2, dim=-1)
    if limit:
        gate = gate.clamp(max=limit)
        up = None if up is None else up.clamp(-limit, limit)
    result = gate * torch.sigmoid(alpha * gate) if alpha != 1.0 else ACTIVATIONS[activation](gate)
    if up is not None:
        result = result * (up + shift)
    return result.to(hidden.dtype)


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
    """For each token, the sum over its chosen experts of `share * (act(x @ upᵀ) @ downᵀ)`.

    Every expert computes every token here, and what was not chosen is dropped: no shape depends on the choice.

    Args:
        tokens: float[N, E].
        chosen: int64[N, K], experts from 0 to X - 1; any other number chooses none.
        shares: float[N, K], the factor of each choice.
        up: float[X, F, E]; [X, 2F, E] where gated, the gate's half first.
        down: float[X, E, F].
        up_bias: float[X, F or 2F].
        down_bias: float[X, E].
        activation: silu, gelu, gelu_tanh, relu or relu2.
        gated: the result of the activation is multiplied by the other half, plus `shift` (Shazeer 2020, arXiv
            2002.05202, equation 6).
        transposed: `up` is [X, E, F or 2F] and `down` is [X, F, E].
        interleaved: gate and up alternate: gate₀, up₀, gate₁, ... (gpt-oss).
        limit: the gate is at most this, and the other half within ± this, before the activation; 0 for no limit.
        alpha: with silu, `x * sigmoid(alpha * x)`.
        shift: added to the other half (gpt-oss: 1).

    Returns:
        float[N, E] in the tokens' dtype; the sum is taken in float32 (float64 stays).
    """
    if not transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    hits = chosen == torch.arange(up.shape[0], device=chosen.device)[:, None, None]  # [X, N, K]
    hidden = tokens @ up  # [X, N, F or 2F]
    if up_bias is not None:
        hidden = hidden + up_bias[:, None]
    hidden = activate(
        hidden,
        activation=activation,
        gated=gated,
        interleaved=interleaved,
        limit=limit,
        alpha=alpha,
        shift=shift,
    )
    results = hidden @ down  # [X, N, E]
    if down_bias is not None:
        results = results + down_bias[:, None]
    # Zero times what is not finite is not zero, and an expert may overflow on a token that was not for it.
    results = results.masked_fill(~hits.any(-1, keepdim=True), 0.0)
    wide = torch.promote_types(torch.promote_types(results.dtype, shares.dtype), torch.float32)
    share = (shares.to(wide) * hits).sum(-1, keepdim=True)  # [X, N, 1]
    return (results.to(wide) * share).sum(0).to(tokens.dtype)
