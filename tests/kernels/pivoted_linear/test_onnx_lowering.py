"""pivoted_linear in ONNX Runtime: the op's own form gives the op's numbers."""

import numpy as np
import torch
from torch import Tensor, nn

from skink.kernels import PIVOTED_LINEAR
from tests.export.onnx.one_graph import run_both


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kept, self.rest = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(4, 3))
        self.kept_bias, self.rest_bias = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(4))
        self.register_buffer("order", torch.randperm(7))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        op = PIVOTED_LINEAR.overload
        biases = self.kept_bias, self.rest_bias
        return op(x, self.kept, self.rest), op(x, self.kept, self.rest, *biases, self.order)


def test_with_biases_and_an_order_and_without(tmp_path):
    expected, found, _ = run_both(Layers(), {"x": torch.randn(2, 4, 8)}, {"x": {0: "B", 1: "T"}}, tmp_path / "out")
    for wanted, got in zip(expected, found):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
