import pytest
import torch

from skink.export.onnx import opaque


@pytest.mark.parametrize(
    ("op", "arguments", "shape", "dtype"),
    [
        (opaque.ATTENTION_MASK, ("q", "k", None, True, 0), (3, 5), torch.bool),
        (opaque.ATTENTION_MASK, ("q", "k", "mask", True, 2), (2, 1, 3, 5), torch.bool),
        (opaque.ATTENTION, ("q", "k", "v", None, 1.0, 0.0, None, None), (2, 4, 3, 6), torch.float32),
        (opaque.ROTARY_PAIRS, ("q", "q", "q", False, 8), (2, 4, 3, 8), torch.float32),
        (opaque.RESHAPE, ("q", [0, 2, -1]), (2, 2, 48), torch.float32),
        (opaque.KEEP_LAST, ("q", "count"), (2, 4, 3, 8), torch.float32),
    ],
)
def test_each_has_the_shape_of_its_result(op, arguments, shape, dtype):
    tensors = {
        "q": torch.empty(2, 4, 3, 8, device="meta"),
        "k": torch.empty(2, 2, 5, 8, device="meta"),
        "v": torch.empty(2, 2, 5, 6, device="meta"),
        "mask": torch.empty(2, 9, dtype=torch.bool, device="meta"),
        "count": torch.empty((), dtype=torch.int64, device="meta"),
    }
    result = op.target(*(tensors[entry] if isinstance(entry, str) else entry for entry in arguments))
    assert (tuple(result.shape), result.dtype) == (shape, dtype)


def test_an_op_is_defined_once():
    again = opaque.OpaqueOp(opaque.KEEP_LAST.schema, opaque.KEEP_LAST.fake)
    assert again.target is opaque.KEEP_LAST.target
