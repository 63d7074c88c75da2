"""The definition of rotary: what the compiled kernel refuses."""

import pytest
import torch

from skink.kernels import ROTARY, OpCall
from skink.kernels.cpp.library import library


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float16, "needs tables in float32 or in the input's dtype, got ['torch.float16']"),
    ],
)
def test_tables_of_a_third_dtype_are_refused(table: torch.dtype, reason: str | None) -> None:
    if not library().available:
        pytest.skip(library().reason)
    (variant,) = ROTARY.variants
    x, tables = torch.zeros(1, 2, 3, 4).bfloat16(), torch.zeros(1, 3, 4, dtype=table)
    assert variant.supports(OpCall(ROTARY.bind((x, tables, tables), {}), torch.device("cpu"))) == reason
