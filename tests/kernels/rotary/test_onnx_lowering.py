import numpy as np
import torch
from torch import Tensor, nn

from skink.kernels import ROTARY
from tests.export.onnx.one_graph import operators, run_both

_DIMS = {"x": {0: "B", 2: "T"}, "angles": {0: "B", 1: "T"}, "cos": {0: "B", 1: "T"}, "sin": {0: "B", 1: "T"}}


class Rotations(nn.Module):
    """Tables that repeat by construction, and tables that may not."""

    def forward(self, x: Tensor, angles: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        halves = torch.cat((angles, angles), dim=-1)
        pairs = torch.repeat_interleave(angles, 2, dim=-1)
        rotary = ROTARY.overload
        return (
            rotary(x[..., :8], halves.cos() * 1.5, halves.sin() * 1.5),
            rotary(x, halves.cos(), halves.sin()),
            rotary(x, pairs.cos(), pairs.sin(), True),
            rotary(x, cos, sin),
            rotary(x, cos, sin, True),
            rotary(x[..., :8], cos, sin),
        )


def _inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "x": torch.randn(2, 3, 5, 12),
        "angles": torch.randn(2, 5, 4),
        "cos": torch.randn(2, 5, 8),
        "sin": torch.randn(2, 5, 8),
    }


def test_every_form_of_the_op(tmp_path):
    expected, found, model = run_both(Rotations(), _inputs(), _DIMS, tmp_path / "out")
    for wanted, got in zip(expected, found):
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)
    # Where nothing says that the tables repeat, the runtime's operator would drop half of them.
    assert operators(model).count("RotaryEmbedding") == 3
