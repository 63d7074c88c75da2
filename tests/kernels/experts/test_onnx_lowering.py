import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skink.kernels import EXPERTS
from tests.export.onnx.one_graph import operators, run_both
from tests.kernels.experts.cases import Case, cases

LIKE = [case for case in cases() if (case.tokens, case.choices) == (7, 2)]
ALONE = [case for case in cases() if case.tokens > 1 and case not in LIKE]


class Mixtures(nn.Module):
    """One call for each case, all on the same tokens."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.options = []
        for index, case in enumerate(cases):
            (_, _, _, *weights), options = case.arguments(torch.float32)
            self.options.append(options)
            for name, tensor in zip(("up", "down", "up_bias", "down_bias"), weights, strict=True):
                setattr(self, f"{name}_{index}", None if tensor is None else nn.Parameter(tensor))

    def forward(self, tokens: Tensor, chosen: Tensor, shares: Tensor) -> tuple[Tensor, ...]:
        found = []
        for index, options in enumerate(self.options):
            weights = [getattr(self, f"{name}_{index}") for name in ("up", "down", "up_bias", "down_bias")]
            found.append(EXPERTS.overload(tokens, chosen, shares, *weights, **options))
        return tuple(found)


@pytest.mark.parametrize("like", [LIKE, *([case] for case in ALONE)], ids=lambda like: f"{len(like)}-{like[0]}")
def test_every_form_of_the_op(like: list[Case], tmp_path) -> None:
    (tokens, chosen, shares, *_), _ = like[0].arguments(torch.float32)
    inputs = {"tokens": tokens, "chosen": chosen, "shares": shares}
    dims = {name: {0: "N"} for name in inputs}
    expected, found, model = run_both(Mixtures(like), inputs, dims, tmp_path / "out")
    for case, wanted, got in zip(like, expected, found, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=3e-6, err_msg=str(case))
    assert operators(model).count("Scan") == len(like)
