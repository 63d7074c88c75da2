"""The reference of rotary, against rotations written with complex numbers, and transformers' own."""

import cmath

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from skink.kernels import ROTARY
from skink.kernels.rotary.reference import rotary
from tests.kernels.closeness import assert_close, perturbed

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tables(batch: int, length: int, width: int, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Angles [B, T, width/2], and full tables of their cosines and sines."""
    angles = torch.rand(batch, length, width // 2, dtype=torch.float64) * 6
    spread = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return angles, spread.cos(), spread.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "width"), [(8, 8), (10, 6), (2, 2)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_pairs_are_turned_by_their_angles(
    dtype: torch.dtype, size: int, width: int, interleaved: bool, batch: int
) -> None:
    x = torch.randn(2, 3, 5, size, dtype=torch.float64).to(dtype)
    angles, cos, sin = tables(batch, 5, width, interleaved)
    cos, sin = cos.to(dtype), sin.to(dtype)
    found = rotary(x, cos, sin, interleaved)
    assert found.dtype is dtype
    exact = x.double().clone()
    for b in range(2):
        for t in range(5):
            for pair in range(width // 2):
                one, other = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width // 2)
                # The tables as rounded, not the angle, are what the op is given.
                turn = complex(float(cos[b % batch, t, one]), float(sin[b % batch, t, one]))
                assert cmath.isclose(turn, cmath.exp(1j * float(angles[b % batch, t, pair])), abs_tol=1e-2)
                for h in range(3):
                    point = complex(float(x[b, h, t, one]), float(x[b, h, t, other])) * turn
                    exact[b, h, t, one], exact[b, h, t, other] = point.real, point.imag
    assert_close(ROTARY, found, exact)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(ROTARY, perturbed(ROTARY, found), exact)


def test_transformers_own() -> None:
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    _, cos, sin = tables(2, 5, 8, interleaved=False)
    cos, sin = cos.float(), sin.float()
    for found, wanted in zip(
        (rotary(query, cos, sin), rotary(key, cos, sin)), apply_rotary_pos_emb(query, key, cos, sin), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_features_past_the_tables_pass_through() -> None:
    x = torch.randn(1, 2, 3, 10)
    _, cos, sin = tables(1, 3, 4, interleaved=False)
    assert torch.equal(rotary(x, cos.float(), sin.float())[..., 4:], x[..., 4:])
