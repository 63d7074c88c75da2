import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skink.kernels import ATTENTION
from tests.export.onnx.one_graph import operators, run_both

_DIMS = {name: {0: "B", 2: "T"} for name in ("q", "k", "v", "w")} | {"attention_mask": {0: "B", 1: "T"}}


class Attentions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(4))
        self.slopes = nn.Parameter(torch.rand(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, w: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        attention, keep = ATTENTION.overload, attention_mask.bool()
        return (
            attention(q, k, v, scale=0.3),
            attention(q, k, v, keep, scale=0.3),
            attention(q, k, v, keep, scale=0.3, window=3),
            attention(q, k, v, keep, scale=3.0, softcap=2.0),
            attention(q, k, w, keep, scale=0.3),
            attention(q, k, v, keep, scale=0.3, sinks=self.sinks),
            attention(q, k, w, keep, scale=3.0, softcap=2.0, window=3, sinks=self.sinks),
            attention(q, k, v, keep, scale=0.3, alibi=self.slopes),
            attention(q, k, v, scale=0.3, alibi=self.slopes),
            attention(q, k, v, keep, scale=3.0, softcap=2.0, alibi=self.slopes),
            attention(q, k, v, keep, scale=3.0, sinks=self.sinks, alibi=self.slopes),
        )


class Bidirectional(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, w: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        attention, keep = ATTENTION.overload, attention_mask.bool()
        return (
            attention(q, k, v, keep, scale=0.3, causal=False),
            attention(q, k, w, scale=0.3, causal=False),
            attention(q, k, w, keep, scale=0.3, causal=False, window=3),
        )


def _inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, :2] = 0
    shapes = {"q": (2, 4, 7, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 8), "w": (2, 2, 7, 6)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | {"attention_mask": mask}


@pytest.fixture(scope="module", params=[(Attentions, 7), (Bidirectional, 3)], ids=["causal", "bidirectional"])
def both(request, tmp_path_factory):
    module, fused = request.param
    return fused, *run_both(module(), _inputs(), _DIMS, tmp_path_factory.mktemp("attention") / "out")


def test_every_form_of_the_op(both):
    fused, expected, found, model = both
    real = _inputs()["attention_mask"].bool()[:, None, :, None].numpy()
    for index, (wanted, got) in enumerate(zip(expected, found)):
        assert np.isfinite(got).all(), index
        np.testing.assert_allclose(got * real, wanted * real, rtol=3e-6, atol=3e-6, err_msg=str(index))
    assert operators(model).count("Attention") == fused  # all but those with sinks, and with a soft cap and alibi


def test_a_mask_is_built_once_for_each_kind(both):
    fused, _, _, model = both
    # Causal: alone, with padding, and with a window too, which keeps a past of its own. Bidirectional: the window.
    assert operators(model).count("LessOrEqual") == (3 if fused == 7 else 0)
    assert operators(model).count("Greater") == 1
