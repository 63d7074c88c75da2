"""Ops that PyTorch's exporter keeps as they are: each has a shape, no implementation, and an ONNX lowering.

They live in the namespace `skink_onnx` and stand in graphs on their way to ONNX only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnxscript
import torch
from torch import Tensor

op: Any = onnxscript.opset23  # annotated for scripts; what a lowering handles is values of a graph being built

# Lives as long as the process: PyTorch drops ops with their library.
_LIBRARY = torch.library.Library("skink_onnx", "DEF")
_END = 2**63 - 1

Translation = Callable[..., Any]


@dataclass(frozen=True)
class OpaqueOp:
    """One such op: its schema, and an empty tensor of its result's shape and dtype."""

    schema: str
    fake: Callable[..., Tensor]

    @property
    def target(self) -> Any:
        """The op as it stands in graphs, registered when first asked for."""
        name = self.schema.partition("(")[0]
        if self.schema not in _DEFINED:
            _LIBRARY.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"skink_onnx::{name}", self.fake, lib=_LIBRARY)
            _DEFINED.add(self.schema)
        return getattr(torch.ops.skink_onnx, name).default


_DEFINED: set[str] = set()


def _fake_mask(query: Tensor, key: Tensor, key_mask: Tensor | None, causal: bool, window: int) -> Tensor:
    pairs = (query.shape[2], key.shape[2])
    shape = pairs if key_mask is None else (key_mask.shape[0], 1, *pairs)
    return query.new_empty(shape, dtype=torch.bool)


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


def _like_input(input: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input)


def _fake_reshape(input: Tensor, sizes: list[int]) -> Tensor:
    return input.reshape([input.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)])


ATTENTION_MASK = OpaqueOp(
    "attention_mask(Tensor query, Tensor key, Tensor? key_mask, bool causal, int window) -> Tensor", _fake_mask
)
ATTENTION = OpaqueOp(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, float softcap, Tensor? sinks, "
    "Tensor? alibi) -> Tensor",
    _fake_attention,
)
ROTARY_PAIRS = OpaqueOp(
    "rotary_pairs(Tensor input, Tensor cos, Tensor sin, bool interleaved, int width) -> Tensor", _like_input
)
# A size of 0 is that of the input in its place, as in ONNX.
RESHAPE = OpaqueOp("reshape(Tensor input, int[] sizes) -> Tensor", _fake_reshape)
# The last `count` tokens, all where it is 0. Its shape says all: nothing after it may depend on how many there are.
KEEP_LAST = OpaqueOp("keep_last(Tensor input, Tensor count) -> Tensor", _like_input)


def translate_reshape(input: Any, sizes: list[int]) -> Any:
    """`RESHAPE` in ONNX."""
    return op.Reshape(input, op.Constant(value_ints=list(sizes)))


def translate_keep_last(input: Any, count: Any) -> Any:
    """`KEEP_LAST` in ONNX, for an input [B, T, E]."""
    # Minus zero is zero, and everything from there is all.
    start = op.Unsqueeze(op.Neg(count), op.Constant(value_ints=[0]))
    return op.Slice(input, start, op.Constant(value_ints=[_END]), op.Constant(value_ints=[1]))
