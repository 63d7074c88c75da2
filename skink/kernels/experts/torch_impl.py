"""`skink::experts` with tokens sorted by expert: one pair of products for each expert that any token chose.

Weights of other experts are not read: one token reads K of X. How many tokens an expert has is known only when they
are there, so that a compiled graph, which needs shapes beforehand, calls all of this as one operator. That one has no
gradient: where gradients are wanted, a compiled graph gets the reference.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from skink.kernels.experts.reference import activate
from skink.kernels.experts.reference import experts as reference


def experts(*args: Any, **options: Any) -> Tensor:
    """As the reference."""
    if not torch.compiler.is_compiling():
        return _sorted(*args, **options)
    result: Tensor = (reference if torch.is_grad_enabled() else _opaque)(*args, **options)
    return result


def _sorted(
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
    number, choices = up.shape[0], chosen.shape[1]
    wide = torch.promote_types(torch.promote_types(tokens.dtype, shares.dtype), torch.float32)
    flat_shares = shares.reshape(-1, 1).to(wide)
    result = tokens.new_zeros(tokens.shape, dtype=wide)
    ranked, order = chosen.reshape(-1).sort(stable=True)
    # Where each expert's pairs of token and choice begin and end among the sorted ones; the one copy to the host.
    bounds = torch.searchsorted(ranked, torch.arange(number + 1, dtype=ranked.dtype, device=ranked.device)).tolist()
    # Where nobody chose, the first expert computes no rows, so that gradients are zeros and not missing.
    idle = bounds[0] == bounds[-1]
    for expert in range(number):
        pairs = order[bounds[expert] : bounds[expert + 1]]
        if not len(pairs) and not (idle and expert == 0):
            continue
        rows = pairs.div(choices, rounding_mode="floor")
        hidden = _product(tokens[rows], up[expert], up_bias[expert] if up_bias is not None else None, transposed)
        hidden = activate(
            hidden,
            activation=activation,
            gated=gated,
            interleaved=interleaved,
            limit=limit,
            alpha=alpha,
            shift=shift,
        )
        part = _product(hidden, down[expert], down_bias[expert] if down_bias is not None else None, transposed)
        result = result.index_add(0, rows, part.to(wide) * flat_shares[pairs])
    return result.to(tokens.dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return linear(x, weight, bias)
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


_opaque = torch.library.custom_op("skink_torch::experts", _sorted, mutates_args=())


@_opaque.register_fake
def _(tokens: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)
