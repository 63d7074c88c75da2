"""`skink::attention`: see reference.py for the meaning and README.md for layout and cost."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from skink.kernels.attention.reference import attention
from skink.kernels.opdef import Cost, OpCall, OpDef, StateSpec, StateTensor, Tolerance, Variant, cpp_variant, nbytes


def _cost(arguments: Mapping[str, Any]) -> Cost:
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    pairs = int(query.shape[0]) * int(query.shape[1]) * int(query.shape[2]) * int(key.shape[2])
    if arguments["causal"] and int(query.shape[2]) == int(key.shape[2]):
        pairs = pairs // 2
    macs = pairs * (int(query.shape[3]) + int(value.shape[3]))
    output = nbytes(query) // int(query.shape[3]) * int(value.shape[3])
    return Cost(macs=macs, bytes=nbytes(query, key, value) + output)


def _state(arguments: Mapping[str, Any]) -> tuple[StateTensor, ...]:
    # A query sees itself and window - 1 keys before it, so window - 1 old keys are all that can ever be read again.
    window = int(arguments["window"])
    if window:
        return (StateTensor("key", "key", "ring", window - 1), StateTensor("value", "value", "ring", window - 1))
    return (StateTensor("key", "key", "append"), StateTensor("value", "value", "append"))


def _refuses_state(arguments: Mapping[str, Any]) -> str | None:
    return None if arguments["causal"] else "is not causal: tokens to come would change results already given"


def _load_torch() -> Callable[..., Tensor]:
    from skink.kernels.attention.torch_impl import attention as implementation

    return implementation


def _load_cpu() -> Callable[..., Tensor]:
    from skink.kernels.attention.cpu import attention as implementation

    return implementation


def _torch_supports(call: OpCall) -> str | None:
    if call.arguments["softcap"]:
        return "has no soft cap"
    if call.arguments["sinks"] is not None:
        return "has no sinks"
    return None


def _cpp_supports(call: OpCall) -> str | None:
    return None


def _fake(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, **_: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


OP = OpDef(
    name="attention",
    schema=(
        "attention(Tensor query, Tensor key, Tensor value, Tensor? key_mask=None, *, bool causal=True, float scale, "
        "int window=0, float softcap=0.0, Tensor? sinks=None, Tensor? alibi=None) -> Tensor"
    ),
    reference=attention,
    fake=_fake,
    tolerance={
        torch.float64: Tolerance(1e-12, 1e-12),
        torch.float32: Tolerance(2e-6, 1e-5),
        torch.bfloat16: Tolerance(2e-2, 2e-2),
        torch.float16: Tolerance(3e-3, 4e-3),
    },
    cost=_cost,
    variants=(
        cpp_variant("attention", _cpp_supports, _load_cpu),
        Variant("torch", _load_torch, _torch_supports, differentiable=True),
    ),
    state=StateSpec(tensors=_state, axis=2, refuses=_refuses_state),
)
