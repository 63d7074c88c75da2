"""`skink::attention` in ONNX: `Attention` (opset 23) with one boolean mask that all layers of a kind share.

Candidates, median µs of one call, joining past and new keys included; ONNX Runtime 1.31 on the CPU, 2 threads, float32:

| H/Hk, D  | B, T, past | Attention, keys joined | Attention, past given | primitives | GroupQueryAttention |
| -------- | ---------- | ---------------------- | --------------------- | ---------- | ------------------- |
| 8/4, 32  | 1, 1, 255  | 31                     | 42                    | 45         | 70                  |
| 8/4, 32  | 1, 1, 2047 | 215                    | 334                   | 220        | 448                 |
| 8/4, 32  | 1, 256, 0  | 1542                   | 1519                  | 2049       | 2103                |
| 32/8, 64 | 1, 1, 2047 | 1358                   | 1694                  | 994        | 2275                |
| 32/8, 64 | 1, 256, 0  | 8312                   | 13725                 | 20031      | 17190               |

The first is chosen: quickest or near it everywhere, and no key is copied for each of the query heads that share it. All
are within 1e-6 of float64. Primitives win long decode only, and lose prefill by 2.4 times. GroupQueryAttention takes
left padding through an additive bias only, and refuses several tokens with a past in a batch, as chunked prefill gives
it. Also seen:

- `is_causal` without `past_key` aligns to the top left, so a causal mask is always given as a tensor.
- Boolean and additive masks are equally quick. A row that may see nothing stays finite.
- `softcap` comes before the mask, as the op wants it.
- All scores are computed, the future's too, so long prompts are best read in chunks: see `OrtRunner`.
"""

import math
from typing import Any

import onnxscript
from onnx import TensorProto

op: Any = onnxscript.opset23  # annotated for scripts; what a lowering handles is values of a graph being built

_END = 2**63 - 1
_LEAST = -3.4028234663852886e38


def attention_mask(query: Any, key: Any, key_mask: Any, causal: bool, window: int) -> Any:
    """Which key each query may see: bool[T, S], or bool[B, 1, T, S] with a `key_mask` [B, M].

    Only the shapes of `query` and `key` are read. At least one of causal, window and key_mask is set.
    """
    tokens, keys = op.Shape(query, start=2, end=3), op.Shape(key, start=2, end=3)
    allowed = None
    if causal or window:
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        total = op.Squeeze(keys)
        key_position = op.Range(zero, total, one)
        query_position = op.Unsqueeze(op.Range(op.Sub(total, op.Squeeze(tokens)), total, one), _integers(1))
        if causal:
            allowed = op.LessOrEqual(key_position, query_position)
        if window:
            near = op.Greater(key_position, op.Sub(query_position, op.Constant(value_int=window)))
            allowed = near if allowed is None else op.And(allowed, near)
    if key_mask is None:
        return allowed
    # The mask may cover more of the past than the keys do: its tail lines up with them.
    tail = op.Slice(key_mask, op.Neg(keys), _integers(_END), _integers(1))
    present = op.Unsqueeze(tail, _integers(1, 2))
    if allowed is not None:
        return op.And(allowed, present)
    return op.Expand(present, op.Concat(_integers(1, 1), tokens, _integers(1), axis=0))


def attention(query: Any, key: Any, value: Any, mask: Any, scale: float, softcap: float, sinks: Any, alibi: Any) -> Any:
    """The op with its mask ready: bool[T, S], bool[B, 1, T, S] or None."""
    bias = None if alibi is None else _bias(query, key, alibi)
    if sinks is not None or (softcap and bias is not None):
        return _by_primitives(query, key, value, mask, scale, softcap, sinks, bias)
    if bias is not None:
        bias = op.CastLike(bias, query)
        mask = bias if mask is None else op.Where(mask, bias, op.CastLike(op.Constant(value_float=-math.inf), query))
    result, *_ = op.Attention(query, key, value, mask, scale=scale, softcap=softcap)
    return result


def _bias(query: Any, key: Any, alibi: Any) -> Any:
    """What the scores gain: float[1, H, T, S]."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    tokens = op.Squeeze(op.Shape(query, start=2, end=3))
    total = op.Squeeze(op.Shape(key, start=2, end=3))
    query_position = op.Unsqueeze(op.Range(op.Sub(total, tokens), total, one), _integers(1))
    after = op.Cast(op.Sub(op.Range(zero, total, one), query_position), to=TensorProto.FLOAT)
    return op.Mul(op.Reshape(op.Cast(alibi, to=TensorProto.FLOAT), _integers(1, -1, 1, 1)), after)


def _by_primitives(
    query: Any, key: Any, value: Any, mask: Any, scale: float, softcap: float, sinks: Any, bias: Any
) -> Any:
    """For what `Attention` lacks: sinks, and a bias after the soft cap (its own comes before).

    Query heads that share a key head become its rows.
    """
    heads, groups = int(query.shape[1]), int(key.shape[1])
    folded = op.Reshape(query, _integers(0, groups, -1, int(query.shape[3])))
    scores = op.MatMul(folded, op.Transpose(key, perm=[0, 1, 3, 2]))
    scores = op.Reshape(op.Cast(scores, to=TensorProto.FLOAT), _integers(0, heads, -1, 0))
    scores = op.Mul(scores, op.Constant(value_float=scale))
    if softcap:
        cap = op.Constant(value_float=softcap)
        scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    if bias is not None:
        scores = op.Add(scores, bias)
    if mask is not None:
        scores = op.Where(mask, scores, op.Constant(value_float=_LEAST))
    if sinks is None:
        weights = op.Softmax(scores, axis=-1)
    else:
        sink = op.Reshape(op.Cast(sinks, to=TensorProto.FLOAT), _integers(1, heads, 1, 1))
        largest = op.Max(op.ReduceMax(scores, _integers(-1), keepdims=1), sink)
        powers = op.Exp(op.Sub(scores, largest))
        total = op.Add(op.ReduceSum(powers, _integers(-1), keepdims=1), op.Exp(op.Sub(sink, largest)))
        weights = op.Div(powers, total)
    weights = op.Reshape(op.CastLike(weights, value), _integers(0, groups, -1, 0))
    return op.Reshape(op.MatMul(weights, value), _integers(0, heads, -1, int(value.shape[3])))


def _integers(*values: int) -> Any:
    return op.Constant(value_ints=list(values))
