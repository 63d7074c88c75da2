"""Attention and masks of transformers' models as semantic ops.

transformers lets a library register its own attention function and its own mask function. Ours put `skink::attention`
straight into the graph, and keep mask building out of it: the mask function recognises what kind of mask the model
asks for (causal, windowed, bidirectional) and the attention function turns that into the op's arguments.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface

from skink.errors import CaptureError

IMPLEMENTATION = "skink"


class OwnMaskError(CaptureError):
    """A model does something with its masks that their semantic form cannot say."""

    def __init__(self, what: str) -> None:
        super().__init__("CAPTURE-003", what, fix="give example_inputs= to capture the model as a plain module.")


# Which (causal, window) each mask that a model passes to its attention stands for, for as long as the mask lives; or
# the error to raise if some attention does read it.
_MASK_KINDS = WeakTensorKeyDictionary()


def classify_mask(mask_function: Callable[..., Any]) -> tuple[bool, int] | None:
    """(causal, window) of a transformers mask function, found by asking it; None where it is of another kind.

    A mask function says for (batch, head, query, key) whether the query may see the key. It is asked for every pair of
    a few hundred positions, and the answers are compared with what a causal mask and its window would give.
    """
    answers = _answers(mask_function)
    if answers is None:
        return None
    query, key, seen = answers
    if bool(seen.all()):
        return False, 0
    if torch.equal(seen, key <= query):
        return True, 0
    last = int(key[0, -1])
    distance = _largest_distance(mask_function, last)
    window = distance + 1
    if torch.equal(seen, (key <= query) & (key > query - window)):
        return True, window
    return None


def _answers(mask_function: Callable[..., Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Query positions, key positions, and which sees which; None where that is no matter of positions alone."""
    # Far enough for windows and chunks of any size that a model uses: sampled positions, not every one.
    positions = torch.tensor(sorted({*range(72), *(2**k + d for k in range(7, 21) for d in (-1, 0, 1))}))
    zero = torch.tensor(0)
    query, key = positions[:, None], positions[None, :]
    try:
        seen = torch.as_tensor(mask_function(zero, zero, query, key)).expand(len(positions), len(positions))
    except Exception:
        # It indexes tensors of the model's own inputs by these positions, in ways that no type of error is sure for: a
        # mask that depends on them is none of our kinds, and the caller says so.
        return None
    return None if isinstance(seen, FakeTensor) else (query, key, seen)


def _largest_distance(mask_function: Callable[..., Any], query: int) -> int:
    """How far back from `query` the mask function lets it see, by bisection."""
    zero = torch.tensor(0)
    low, high = 0, query
    while low < high:
        middle = (low + high + 1) // 2
        if bool(mask_function(zero, zero, torch.tensor(query), torch.tensor(query - middle))):
            low = middle
        else:
            high = middle - 1
    return low


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    # Tracing modes belong to a thread: in another one the mask function computes real values.
    with ThreadPoolExecutor(max_workers=1) as untraced:
        kind = untraced.submit(_kind, mask_function).result()
    if attention_mask is None:
        # As transformers does it for PyTorch's attention: without a mask the layer itself says whether it is causal.
        if isinstance(kind, CaptureError) or kind[1]:
            raise OwnMaskError("the model drops its padding mask before attention.")
        return None
    # A tensor object of its own for each kind; the copy is cleaned away later.
    mask = attention_mask.view_as(attention_mask)
    _MASK_KINDS[mask] = kind
    return mask


def _kind(mask_function: Callable[..., Any]) -> tuple[bool, int] | CaptureError:
    """What `classify_mask` says, or where that is nothing, the error to raise if some attention reads the mask."""
    kind = classify_mask(mask_function)
    if kind is not None:
        return kind
    answers = _answers(mask_function)
    if answers is None:
        return OwnMaskError("this model's attention mask depends on more than positions and padding.")
    if torch.equal(answers[2], answers[2].T):
        return OwnMaskError("this model's attention sees a window in both directions.")
    return CaptureError(
        "CAPTURE-003",
        "this model's attention mask is none of causal, causal with a window, and bidirectional.",
        where=getattr(mask_function, "__qualname__", ""),
        fix="Skink cannot capture models with chunked, packed or prefix masks yet.",
    )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    name = type(module).__name__
    if position_bias is not None:
        raise OwnMaskError(f"{name} adds a position bias to its scores.")
    kind = (True, 0)
    if attention_mask is not None:
        found = _MASK_KINDS.get(attention_mask)
        if found is None:
            raise OwnMaskError(f"{name} builds its attention mask itself, outside transformers' mask interface.")
        if isinstance(found, CaptureError):
            raise found
        kind = found
    elif not (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
        kind = (False, 0)
    causal, window = kind
    result = torch.ops.skink.attention(
        query,
        key,
        value,
        attention_mask,
        causal=causal,
        scale=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        window=window,
        softcap=float(softcap or 0.0),
        sinks=s_aux,
    )
    return result.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
