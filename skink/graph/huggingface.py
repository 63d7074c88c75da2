"""What Hugging Face decoders need for capture: attention and masks as semantic ops, no cache, explicit inputs.

transformers lets a library register its own attention function and its own mask function. Ours put `skink::attention`
straight into the graph, and keep mask building out of it: the mask function recognises what kind of mask the model
asks for (causal, windowed, bidirectional) and the attention function turns that into the op's arguments.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from skink.errors import CaptureError
from skink.graph.capture import Subject
from skink.graph.program import Input

IMPLEMENTATION = "skink"

# Exported in bfloat16 so that casts to the model's own dtype can be told from casts to float32; see Subject.cast.
_EXPORT_DTYPE = torch.bfloat16


# Which (causal, window) each mask that a model passes to its attention stands for, for as long as the mask lives.
_MASK_KINDS = WeakTensorKeyDictionary()


def classify_mask(mask_function: Callable[..., Any]) -> tuple[bool, int] | None:
    """(causal, window) of a transformers mask function, found by asking it; None where it is of another kind.

    A mask function says for (batch, head, query, key) whether the query may see the key. It is asked for every pair of
    a few hundred positions, and the answers are compared with what a causal mask and its window would give.
    """
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
    if isinstance(seen, FakeTensor):
        return None  # it depends on the inputs
    if bool(seen.all()):
        return False, 0
    if torch.equal(seen, key <= query):
        return True, 0
    last = int(positions[-1])
    distance = _largest_distance(mask_function, last)
    window = distance + 1
    if torch.equal(seen, (key <= query) & (key > query - window)):
        return True, window
    return None


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
) -> Tensor:
    if attention_mask is None:
        raise CaptureError(
            "CAPTURE-003", "the model drops its padding mask before attention.", fix="pass attention_mask."
        )
    # Tracing modes belong to a thread: in another one the mask function computes real values.
    with ThreadPoolExecutor(max_workers=1) as untraced:
        kind = untraced.submit(classify_mask, mask_function).result()
    if kind is None:
        raise CaptureError(
            "CAPTURE-003",
            "this model's attention mask is none of causal, causal with a window, and bidirectional.",
            where=getattr(mask_function, "__qualname__", ""),
            fix="Skink cannot capture models with chunked, packed or prefix masks yet.",
        )
    # A tensor object of its own for each kind; the copy is cleaned away later.
    mask = attention_mask.view_as(attention_mask)
    _MASK_KINDS[mask] = kind
    return mask


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
        raise CaptureError("CAPTURE-003", f"{name} adds a position bias to its scores.", fix="not supported yet.")
    kind = (True, 0)
    if attention_mask is not None:
        found = _MASK_KINDS.get(attention_mask)
        if found is None:
            raise CaptureError(
                "CAPTURE-003",
                f"{name} builds its attention mask itself, outside transformers' mask interface.",
                fix="Skink recognises such masks by pattern in a later release; capture another attention class.",
            )
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
    return result.transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


class _Decoder(nn.Module):
    """A decoder as a pure function of tokens, mask and positions."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        logits: Tensor = self.model(**arguments, use_cache=False).logits
        return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Decoder":
        # The copy alone is told to use our attention, so that the caller's model keeps its own.
        clone = _Decoder(copy.deepcopy(self.model, memo))
        model = clone.model
        model.set_attn_implementation(IMPLEMENTATION)
        if getattr(model, "_can_set_experts_implementation", lambda: False)():
            # The one implementation whose shapes do not depend on which experts are chosen.
            model.set_experts_implementation("batched_mm")
        model.config.use_cache = False
        return clone


def huggingface_subject(model: nn.Module) -> Subject:
    """How to capture a Hugging Face decoder.

    Raises:
        CaptureError: CAPTURE-004 where it is none.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(model, PreTrainedModel) or head is None:
        raise CaptureError(
            "CAPTURE-004",
            f"{type(model).__name__} is not a Hugging Face model with a language-model head.",
            fix="load it with AutoModelForCausalLM, or give example_inputs= for a module of another kind.",
        )
    if model.config.is_encoder_decoder:
        raise CaptureError(
            "CAPTURE-004", f"{type(model).__name__} is an encoder-decoder model.", fix="only decoders are supported."
        )
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = tuple(Input(name, torch.int64, ("B", "T")) for name in names)
    return Subject(module=_Decoder(model), inputs=inputs, prefix="model.", model=model, cast=_EXPORT_DTYPE)
