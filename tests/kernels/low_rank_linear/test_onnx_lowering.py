"""low_rank_linear in ONNX Runtime: the op's own form gives the op's numbers."""

import numpy as np
import torch
from torch import Tensor, nn

from skink.kernels import LOW_RANK_LINEAR
from tests.export.onnx.one_graph import operators, run_both


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(5, 3))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        op = LOW_RANK_LINEAR.overload
        return op(x, self.down, self.up), op(x, self.down, self.up, self.bias)


def test_with_a_bias_and_without(tmp_path):
    expected, found, model = run_both(Layers(), {"x": torch.randn(2, 4, 8)}, {"x": {0: "B", 1: "T"}}, tmp_path / "out")
    for wanted, got in zip(expected, found):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    # Both calls share their products.
    assert operators(model) == ["Transpose", "MatMul", "Transpose", "MatMul", "Add"]
