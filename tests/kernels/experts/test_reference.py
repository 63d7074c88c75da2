"""The reference of experts, against the formula in float64, and where it may not be seen to compute too much."""

import pytest
import torch

from skink.kernels import EXPERTS
from skink.kernels.experts.reference import experts
from tests.kernels.closeness import assert_close, perturbed
from tests.kernels.experts.cases import Case, cases, formula

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_formula(case: Case, dtype: torch.dtype) -> None:
    tensors, options = case.arguments(dtype)
    exact = formula(case, tensors)
    found = experts(*tensors, **options)
    assert found.dtype is dtype
    assert_close(EXPERTS, found, exact)
    if exact.numel():
        with pytest.raises(AssertionError, match="off by"):
            assert_close(EXPERTS, perturbed(EXPERTS, found), exact)


def test_an_expert_that_overflows_on_anothers_token_harms_nobody() -> None:
    (tokens, _, shares, up, down, *_), options = Case(tokens=2, choices=1).arguments(torch.float16)
    large = up.clone()
    large[3] = 6e4
    chosen = torch.tensor([[0], [1]])
    found = experts(tokens, chosen, shares, large, down, **options)
    assert torch.equal(found, experts(tokens, chosen, shares, up, down, **options))


def test_a_number_that_is_no_expert_chooses_none() -> None:
    (tokens, chosen, shares, *weights), options = Case().arguments(torch.float64)
    beyond, none = chosen.clone(), shares.clone()
    beyond[:, 1], none[:, 1] = 4, 0.0
    torch.testing.assert_close(
        experts(tokens, beyond, shares, *weights, **options), experts(tokens, chosen, none, *weights, **options)
    )


def test_shares_may_be_wider_than_the_tokens() -> None:
    (tokens, chosen, shares, *weights), options = Case().arguments(torch.bfloat16)
    wide = shares.float()
    found = experts(tokens, chosen, wide, *weights, **options)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, experts(tokens, chosen, shares, *weights, **options))
