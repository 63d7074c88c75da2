import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skink.passes.decompose import factorize
from skink.passes.decompose.factorize import (
    discarded_error,
    output_error,
    plain,
    saves,
    uniform_rank,
    whitened,
)

# Tall, wide, square, and sizes that are no multiple of anything.
SHAPES = [(24, 10), (10, 24), (16, 16), (17, 13)]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(features, tokens=200, seed=1):
    """Correlated activations, with scales over four orders of magnitude."""
    scales = torch.logspace(-2, 2, features, dtype=torch.float64)
    return random(tokens, features, seed=seed) @ (random(features, features, seed=seed + 1) * scales)


def best_by_root(weight, covariance, rank):
    """The optimum written another way: truncated SVD of W C^1/2 with the symmetric root, mapped back by its inverse."""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    left, singular, right = torch.linalg.svd(weight @ root, full_matrices=False)
    return left[:, :rank] @ torch.diag(singular[:rank]) @ right[:rank] @ torch.linalg.inv(root)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["auto", "whitening", "output"])
@pytest.mark.parametrize("rank", [1, 4])
def test_whitened_is_the_truncation_under_the_inputs(shape, form, rank):
    weight, x = random(*shape), inputs(shape[1])
    covariance = x.T @ x
    factors = whitened(weight, covariance, rank, form=form, damping=1e-14)
    expected = best_by_root(weight, covariance, rank)
    torch.testing.assert_close(factors.up @ factors.down, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert factors.up.shape == (shape[0], rank)
    assert factors.down.shape == (rank, shape[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_both_forms_agree_to_rounding(shape):
    weight, x = random(*shape), inputs(shape[1])
    one, other = (whitened(weight, x.T @ x, 4, form=form) for form in ("whitening", "output"))
    exact, near = x @ (one.up @ one.down).T, x @ (other.up @ other.down).T
    assert float((exact - near).norm() / exact.norm()) < 1e-9
    assert one.predicted_error == pytest.approx(other.predicted_error, rel=1e-9)
    # Squaring in the Gram matrices leaves the spectrum this precise, relative to its largest value.
    torch.testing.assert_close(one.spectrum, other.spectrum, rtol=0, atol=1e-6 * float(one.spectrum[0]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_predicted_error_is_what_the_calibration_data_measures(shape, dtype):
    weight, x = random(*shape).to(dtype), inputs(shape[1])
    factors = whitened(weight, x.T @ x, 4)
    exact = weight.double()
    kept = factors.up.double() @ factors.down.double()
    measured = float((x @ (exact - kept).T).norm() / (x @ exact.T).norm())
    assert factors.up.dtype == factors.down.dtype == dtype
    assert factors.predicted_error == pytest.approx(measured, rel=1e-6)
    assert factors.weight_error == pytest.approx(float((exact - kept).norm() / exact.norm()), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["whitening", "output"])
def test_the_predicted_error_is_the_discarded_energy(shape, form):
    weight, x = random(*shape), inputs(shape[1])
    factors = whitened(weight, x.T @ x, 4, form=form, damping=1e-14)
    assert factors.predicted_error == pytest.approx(discarded_error(factors.spectrum, 4), rel=1e-6)
    damped = whitened(weight, x.T @ x, 4, form=form)
    assert damped.predicted_error == pytest.approx(discarded_error(damped.spectrum, 4), rel=1e-4)


def test_the_error_of_plain_truncation_is_in_the_same_metric():
    weight, x = random(16, 24), inputs(24)
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    truncated = left[:, :5] @ torch.diag(singular[:5]) @ right[:5]
    measured = float((x @ (weight - truncated).T).norm() / (x @ weight.T).norm())
    factors = whitened(weight, x.T @ x, 5)
    assert factors.plain_error == pytest.approx(measured, rel=1e-6)
    assert factors.predicted_error < 0.9 * factors.plain_error
    assert whitened(weight, x.T @ x, 5, compare=False).plain_error is None


@pytest.mark.parametrize("shape", SHAPES)
def test_no_perturbation_of_the_factors_does_better(shape):
    weight, x = random(*shape), inputs(shape[1])
    covariance = x.T @ x
    factors = whitened(weight, covariance, 3)
    best = output_error(weight, factors.up @ factors.down, covariance)
    for seed in range(20):
        for size in (1e-1, 1e-2, 1e-3):
            up = factors.up + size * factors.up.norm() * random(*factors.up.shape, seed=seed) / shape[0]
            down = factors.down + size * factors.down.norm() * random(*factors.down.shape, seed=seed + 99) / shape[1]
            assert output_error(weight, up @ down, covariance) > best


def test_alternating_least_squares_comes_no_lower():
    weight, x = random(12, 18), inputs(18)
    y = x @ weight.T
    down = random(3, 18, seed=5)
    for _ in range(400):
        up = torch.linalg.lstsq(x @ down.T, y).solution.T
        # min over down of ||x down^T up^T - y||: the part of y in up's span, as a linear function of x.
        down = torch.linalg.lstsq(x, y @ torch.linalg.pinv(up).T).solution.T
    fitted = float((x @ (weight - up @ down).T).norm() / y.norm())
    predicted = whitened(weight, x.T @ x, 3).predicted_error
    assert predicted == pytest.approx(fitted, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_is_the_truncated_svd(shape):
    weight = random(*shape)
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    factors = plain(weight, 4)
    torch.testing.assert_close(factors.up @ factors.down, left[:, :4] @ torch.diag(singular[:4]) @ right[:4])
    torch.testing.assert_close(factors.spectrum, singular)
    assert factors.weight_error == pytest.approx(discarded_error(singular, 4), rel=1e-9)
    assert factors.predicted_error is None


def test_whitened_with_white_inputs_is_plain():
    weight = random(9, 14)
    one, other = plain(weight, 3), whitened(weight, 7.0 * torch.eye(14, dtype=torch.float64), 3)
    torch.testing.assert_close(one.up @ one.down, other.up @ other.down)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["plain", "whitened"])
def test_factors_are_balanced(shape, method):
    weight, x = random(*shape), inputs(shape[1])
    factors = plain(weight, 4) if method == "plain" else whitened(weight, x.T @ x, 4)
    torch.testing.assert_close(factors.up.norm(dim=0), factors.down.norm(dim=1))


@pytest.mark.parametrize("form", ["whitening", "output"])
def test_scaling_the_inputs_changes_nothing(form):
    weight, x = random(10, 12), inputs(12)
    one, other = (whitened(weight, scale * x.T @ x, 4, form=form) for scale in (1.0, 1e-9))
    torch.testing.assert_close(one.up @ one.down, other.up @ other.down, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["whitening", "output"])
def test_fewer_tokens_than_features(shape, form):
    weight, x = random(*shape), inputs(shape[1], tokens=5)
    factors = whitened(weight, x.T @ x, 5, form=form)
    assert torch.isfinite(factors.up).all()
    assert torch.isfinite(factors.down).all()
    # Five tokens span five directions: rank 5 loses nothing of them.
    assert factors.predicted_error < 1e-3
    assert factors.weight_error < 1.5


@pytest.mark.parametrize("form", ["whitening", "output"])
def test_dead_features(form):
    weight, x = random(12, 12), inputs(12)
    x[:, [2, 7]] = 0.0
    factors = whitened(weight, x.T @ x, 6, form=form)
    assert torch.isfinite(factors.up @ factors.down).all()
    # What the dead features would bring cannot matter: the same as without them.
    alive = [index for index in range(12) if index not in (2, 7)]
    without = whitened(weight[:, alive], (x.T @ x)[alive][:, alive], 6)
    assert factors.predicted_error == pytest.approx(without.predicted_error, rel=1e-4)


@pytest.mark.parametrize("form", ["whitening", "output"])
def test_inputs_that_are_all_zero_leave_the_plain_truncation(form):
    weight = random(8, 10)
    factors = whitened(weight, torch.zeros(10, 10, dtype=torch.float64), 3, form=form)
    expected = plain(weight, 3)
    torch.testing.assert_close(factors.up @ factors.down, expected.up @ expected.down)
    assert factors.predicted_error == 0.0


def test_an_indefinite_covariance_gets_more_damping():
    weight, x = random(14, 10), inputs(10)
    covariance = x.T @ x
    # As rounding in a lower precision would leave it: one eigenvalue just below zero.
    values, vectors = torch.linalg.eigh(covariance)
    values[0] = -1e-7 * float(covariance.diagonal().mean())
    factors = whitened(weight, vectors @ torch.diag(values) @ vectors.T, 4, form="whitening")
    assert factors.predicted_error == pytest.approx(whitened(weight, covariance, 4).predicted_error, rel=1e-2)


def test_a_solver_that_never_converges_leaves_the_plain_truncation(monkeypatch):
    weight, x = random(14, 10), inputs(10)
    expected = plain(weight, 4)
    tried = []

    def fail(*arguments):
        tried.append(arguments[-1])
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(factorize, "_whitening", fail)
    factors = whitened(weight, x.T @ x, 4)
    torch.testing.assert_close(factors.up @ factors.down, expected.up @ expected.down)
    assert tried == sorted(tried)
    assert len(tried) == 4


def test_a_weight_of_low_rank_is_kept_whole():
    weight, x = random(20, 3) @ random(3, 12, seed=3), inputs(12)
    factors = whitened(weight, x.T @ x, 3)
    assert factors.predicted_error < 1e-7
    assert factors.weight_error < 1e-6


def test_a_weight_of_zeros():
    factors = whitened(torch.zeros(6, 8), torch.eye(8, dtype=torch.float64), 2)
    assert not (factors.up @ factors.down).any()
    assert (factors.weight_error, factors.predicted_error, factors.plain_error) == (0.0, 0.0, 0.0)


def test_more_rank_never_loses_more():
    weight, x = random(15, 20), inputs(20)
    errors = [whitened(weight, x.T @ x, rank).predicted_error for rank in range(1, 16)]
    assert errors == sorted(errors, reverse=True)


sizes = st.integers(1, 20_000)


@given(st.floats(1e-3, 1.0), sizes, sizes)
def test_uniform_rank_fits_the_share_and_one_more_would_not(keep, rows, columns):
    rank = uniform_rank(keep, rows, columns)
    assert rank * (rows + columns) <= keep * rows * columns * (1 + 1e-6) + 1e-6 * (rows + columns)
    assert (rank + 1) * (rows + columns) > keep * rows * columns * (1 - 1e-6)


@given(st.floats(1e-3, 1.0), st.floats(1e-3, 1.0), sizes, sizes)
def test_rank_grows_with_keep(one, other, rows, columns):
    low, high = sorted((one, other))
    assert uniform_rank(low, rows, columns) <= uniform_rank(high, rows, columns)


@given(sizes, sizes, st.integers(0, 20_000))
def test_saves_is_fewer_parameters(rows, columns, rank):
    if saves(rank, (rows, columns)):
        assert rank * (rows + columns) < rows * columns
    else:
        assert (rank + 1) * (rows + columns) > rows * columns


def test_uniform_rank_is_not_at_the_mercy_of_rounding():
    assert uniform_rank(0.6, 100, 100) == 30
    assert uniform_rank(0.7, 100, 100) == 35
    assert uniform_rank(0.8, 4096, 11008) == math.floor(0.8 * 4096 * 11008 / (4096 + 11008))
    assert not saves(uniform_rank(1.0, 704, 256), (704, 256))
