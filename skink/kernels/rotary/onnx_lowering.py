"""`skink::rotary` in ONNX: `RotaryEmbedding` (opset 23) where the tables repeat, primitives otherwise.

`RotaryEmbedding` takes one angle for each pair of features, half of what the op's tables hold. Where the exporter finds
in the graph that the other half repeats it, it calls `rotary_pairs`.

Median µs of one call, ONNX Runtime 1.31, 2 threads, half-split:

| input               | RotaryEmbedding | primitives |
| ------------------- | --------------- | ---------- |
| f32[1, 8, 1, 32]    | 4               | 8          |
| f32[1, 8, 256, 32]  | 21              | 82         |
| f32[1, 32, 1, 128]  | 5               | 12         |
| f32[1, 32, 256, 128]| 296             | 1373       |
| f16[1, 32, 256, 128]| 181             | 1795       |

Interleaved and partial rotation (16 of 64 features) are as quick and within 2e-7 of float64.
"""

from typing import Any

import onnxscript

op: Any = onnxscript.opset23  # annotated for scripts; what a lowering handles is values of a graph being built


def rotary_pairs(input: Any, cos: Any, sin: Any, interleaved: bool, width: int) -> Any:
    """The first `width` features of `input` [B, H, T, D], turned by the angles of pairs: cos, sin [B, T, width/2]."""
    features = input.shape[-1]
    partial = {} if width == features else {"rotary_embedding_dim": width}
    return op.RotaryEmbedding(
        input, op.CastLike(cos, input), op.CastLike(sin, input), interleaved=int(interleaved), **partial
    )


def rotary(input: Any, cos: Any, sin: Any, interleaved: bool = False) -> Any:
    """As the op, for tables whose entries may all differ; the sizes of the last axes are known."""
    features, width = int(input.shape[-1]), int(cos.shape[-1])
    half = width // 2
    turned = input if width == features else _features(input, 0, width)
    if interleaved:
        pairs = op.Reshape(turned, op.Constant(value_ints=[0, 0, 0, half, 2]))
        swapped = op.Concat(op.Neg(_features(pairs, 1, 2)), _features(pairs, 0, 1), axis=-1)
        rotated = op.Reshape(swapped, op.Constant(value_ints=[0, 0, 0, width]))
    else:
        rotated = op.Concat(op.Neg(_features(turned, half, width)), _features(turned, 0, half), axis=-1)
    cos, sin = (op.Unsqueeze(op.CastLike(table, input), op.Constant(value_ints=[1])) for table in (cos, sin))
    turned = op.Add(op.Mul(turned, cos), op.Mul(rotated, sin))
    return turned if width == features else op.Concat(turned, _features(input, width, features), axis=-1)


def _features(input: Any, start: int, end: int) -> Any:
    """Part of the last axis."""
    return op.Slice(input, op.Constant(value_ints=[start]), op.Constant(value_ints=[end]), op.Constant(value_ints=[-1]))
