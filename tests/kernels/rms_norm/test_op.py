"""The definition of rms_norm: what the compiled kernel refuses."""

import pytest
import torch

from skink.kernels import RMS_NORM, OpCall
from skink.kernels.cpp.library import library


def test_weights_of_a_third_dtype_are_refused() -> None:
    if not library().available:
        pytest.skip(library().reason)
    (variant,) = RMS_NORM.variants
    x, weight = torch.zeros(2, 4).bfloat16(), torch.zeros(4)

    def refusal(*args: object) -> str | None:
        return variant.supports(OpCall(RMS_NORM.bind(args, {}), torch.device("cpu")))

    assert refusal(x, weight.half(), 1e-6) == "needs a weight in float32 or in the input's dtype, got torch.float16"
    assert refusal(x, weight, 1e-6) is None
    assert refusal(x, weight.bfloat16(), 1e-6) is None
    assert refusal(x, None, 1e-6) is None
