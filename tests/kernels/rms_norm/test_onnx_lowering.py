import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skink.kernels import RMS_NORM
from tests.export.onnx.one_graph import operators, run_both


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        norm = RMS_NORM.overload
        return (
            norm(x, self.weight, 1e-6),
            norm(x, self.weight, 1e-2, 1.0),
            norm(x, None, 1e-5),
            norm(x, w, 1e-6, 0.5),
        )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 5, 24) * 3, "w": torch.randn(24)}
    return run_both(Norms(), inputs, {"x": {0: "B", 1: "T"}}, tmp_path_factory.mktemp("norms") / "out")


def test_every_form_of_the_op(both):
    expected, found, model = both
    for wanted, got in zip(expected, found):
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)
    assert operators(model).count("RMSNormalization") == 4


def test_a_stored_weight_takes_the_offset_in(both):
    model = both[2]
    assert {entry.name for entry in model.graph.initializer} >= {"weight", "weight_plus_1"}
    assert operators(model).count("Add") == 1  # the one whose weight is an input
