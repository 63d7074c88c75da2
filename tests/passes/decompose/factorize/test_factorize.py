import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skink.passes.decompose.factorize import factorize as module
from skink.passes.decompose.factorize.factorize import (
    error_energy,
    factorize,
    output_error,
    plain_truncation_energy,
    relative,
    truncation_energy,
    uniform_rank,
    weight_error,
)

# Tall, wide, square, and sizes that are no multiple of anything.
SHAPES = [(24, 10), (10, 24), (16, 16), (17, 13)]
METHODS = ["plain", "whitened", "asvd", "fisher", "two-sided"]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def samples(features, tokens=200, seed=1):
    """Correlated vectors, with scales over four orders of magnitude."""
    scales = torch.logspace(-2, 2, features, dtype=torch.float64)
    return random(tokens, features, seed=seed) @ (random(features, features, seed=seed + 1) * scales)


def moments(shape):
    """(G, C) of gradients and inputs of a weight of this shape."""
    x, g = samples(shape[1]), samples(shape[0], seed=11)
    return g.T @ g, x.T @ x


def metrics(method, shape):
    """(left, right) of a method, as full matrices for the formula and as arguments of the function under test."""
    g, c = moments(shape)
    x, gradient = samples(shape[1]), samples(shape[0], seed=11)
    sizes, rows = x.abs().mean(0), gradient.square().sum(0)
    identity = torch.eye(shape[0], dtype=torch.float64), torch.eye(shape[1], dtype=torch.float64)
    return {
        "plain": (*identity, {}),
        "whitened": (identity[0], c, {"right": c}),
        "asvd": (identity[0], torch.diag(sizes), {"right": sizes}),
        "fisher": (torch.diag(rows), identity[1], {"left": rows}),
        "two-sided": (g, c, {"left": g, "right": c}),
    }[method]


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


def best_by_roots(weight, left, right, rank):
    """The optimum written another way: truncated SVD between symmetric roots, mapped back by their inverses."""
    one, other = root(left), root(right)
    u, singular, v = torch.linalg.svd(one @ weight @ other, full_matrices=False)
    truncated = u[:, :rank] @ torch.diag(singular[:rank]) @ v[:rank]
    return torch.linalg.inv(one) @ truncated @ torch.linalg.inv(other), singular


def product(found, rank):
    up, down = found.at(rank)
    return up.double() @ down.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["auto", "inner", "outer"])
@pytest.mark.parametrize("method", METHODS)
def test_the_optimum_of_each_method_at_all_ranks(shape, form, method):
    weight = random(*shape)
    left, right, arguments = metrics(method, shape)
    found = factorize(weight, form=form, left_damping=1e-13, right_damping=1e-13, **arguments)
    assert found.rank == min(shape)
    for rank in (1, 4):
        expected, singular = best_by_roots(weight, left, right, rank)
        difference = root(left) @ (product(found, rank) - expected) @ root(right)
        assert float(difference.norm() / singular.norm()) < 1e-6
    torch.testing.assert_close(found.spectrum, singular, rtol=0, atol=1e-6 * float(singular[0]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_both_forms_agree_to_rounding(shape, method):
    weight = random(*shape)
    left, right, arguments = metrics(method, shape)
    one, other = (factorize(weight, form=form, **arguments) for form in ("inner", "outer"))
    for rank in (1, 4, 9):
        difference = root(left) @ (product(one, rank) - product(other, rank)) @ root(right)
        assert float(difference.norm() / (root(left) @ weight @ root(right)).norm()) < 1e-8
    for name in ("discarded", "output"):
        exact, near = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(exact, near, rtol=0, atol=1e-8 * float(exact[0]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["inner", "outer"])
@pytest.mark.parametrize("damping", [1e-12, 0.05])
def test_what_is_discarded_is_what_the_factors_lose(shape, form, damping):
    weight, (left, right) = random(*shape), moments(shape)
    found = factorize(weight, left=left, right=right, left_damping=damping, right_damping=1e-12, form=form)
    assert len(found.discarded) == min(shape) + 1
    for rank in range(min(shape) + 1):
        error = weight - product(found, rank)
        loss, output = torch.trace(left @ error @ right @ error.T), torch.trace(error @ right @ error.T)
        assert float(found.discarded[rank]) == pytest.approx(
            float(loss), rel=1e-5, abs=1e-8 * float(found.discarded[0])
        )
        assert float(found.output[rank]) == pytest.approx(float(output), rel=1e-5, abs=1e-8 * float(found.output[0]))
        assert error_energy(error, left=left, right=right) == pytest.approx(float(loss), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_damping_it_is_the_energy_of_the_spectrum(shape):
    weight, (left, right) = random(*shape), moments(shape)
    found = factorize(weight, left=left, right=right, left_damping=1e-13)
    energy = found.spectrum.square().flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(found.discarded[:-1], energy, rtol=1e-6, atol=1e-9 * float(energy[0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_few_ranks_are_as_among_all(shape):
    weight, (left, right) = random(*shape), moments(shape)
    whole, few = factorize(weight, left=left, right=right), factorize(weight, left=left, right=right, rank=3)
    torch.testing.assert_close(few.up @ few.down, product(whole, 3))
    assert few.rank == 3
    torch.testing.assert_close(few.discarded, whole.discarded[:4])
    torch.testing.assert_close(few.output, whole.output[:4])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_energy_of_any_factors(shape):
    weight, (left, right) = random(*shape), moments(shape)
    up, down = random(shape[0], 5, seed=7), random(5, shape[1], seed=8)
    energies = truncation_energy(weight, up, down, left=left, right=right)
    for rank in range(6):
        error = weight - up[:, :rank] @ down[:rank]
        assert float(energies[rank]) == pytest.approx(float(torch.trace(left @ error @ right @ error.T)), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_energy_that_plain_truncation_leaves(shape):
    weight, (_, right) = random(*shape), moments(shape)
    u, singular, v = torch.linalg.svd(weight, full_matrices=False)
    energies = plain_truncation_energy(weight, right, 6)
    assert len(energies) == 7
    for rank in range(7):
        error = weight - u[:, :rank] @ torch.diag(singular[:rank]) @ v[:rank]
        assert float(energies[rank]) == pytest.approx(float(torch.trace(error @ right @ error.T)), rel=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_predicted_error_is_what_the_calibration_data_measures(shape, dtype):
    weight, x = random(*shape).to(dtype), samples(shape[1])
    found = factorize(weight, right=x.T @ x)
    up, down = found.at(4)
    exact, kept = weight.double(), up.double() @ down.double()
    measured = float((x @ (exact - kept).T).norm() / (x @ exact.T).norm())
    assert up.dtype == down.dtype == dtype
    assert output_error(weight, kept, x.T @ x) == pytest.approx(measured, rel=1e-6)
    assert weight_error(weight, up, down) == pytest.approx(float((exact - kept).norm() / exact.norm()), rel=1e-12)
    # Before the factors are rounded, and damping included.
    rounding = 0.1 if dtype == torch.bfloat16 else 1e-4
    assert relative(found.output, 4) == pytest.approx(measured, rel=rounding)


@pytest.mark.parametrize("method", ["whitened", "two-sided"])
def test_no_perturbation_of_the_factors_does_better(method):
    weight = random(17, 13)
    left, right, arguments = metrics(method, (17, 13))
    found = factorize(weight, rank=3, left_damping=1e-13, **arguments)
    best = error_energy(weight - found.up @ found.down, left=left, right=right)
    for seed in range(20):
        for size in (1e-1, 1e-2, 1e-3):
            up = found.up + size * found.up.norm() * random(*found.up.shape, seed=seed) / 17
            down = found.down + size * found.down.norm() * random(*found.down.shape, seed=seed + 99) / 13
            assert error_energy(weight - up @ down, left=left, right=right) > best


def test_alternating_least_squares_comes_no_lower():
    weight, x = random(12, 18), samples(18)
    y = x @ weight.T
    down = random(3, 18, seed=5)
    for _ in range(400):
        up = torch.linalg.lstsq(x @ down.T, y).solution.T
        # min over down of ||x down^T up^T - y||: the part of y in up's span, as a linear function of x.
        down = torch.linalg.lstsq(x, y @ torch.linalg.pinv(up).T).solution.T
    fitted = float((x @ (weight - up @ down).T).norm() / y.norm())
    assert relative(factorize(weight, right=x.T @ x).output, 3) == pytest.approx(fitted, rel=1e-5)


def test_down_is_the_best_there_is_for_up():
    """What the refit of low_rank/refit.py rests on: down = (up^T G up)^-1 up^T G W."""
    for shape in SHAPES:
        weight, (left, right) = random(*shape), moments(shape)
        found = factorize(weight, left=left, right=right, rank=4, left_damping=1e-12)
        expected = torch.linalg.solve(found.up.T @ left @ found.up, found.up.T @ left @ weight)
        torch.testing.assert_close(found.up @ found.down, found.up @ expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_is_the_truncated_svd(shape):
    weight = random(*shape)
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    factors = factorize(weight, rank=4)
    torch.testing.assert_close(factors.up @ factors.down, left[:, :4] @ torch.diag(singular[:4]) @ right[:4])
    torch.testing.assert_close(factors.spectrum, singular)
    exact = float(singular[4:].norm() / singular.norm())
    assert weight_error(weight, factors.up, factors.down) == pytest.approx(exact, rel=1e-9)


def test_white_metrics_change_nothing():
    weight = random(9, 14)
    one = factorize(weight, rank=3)
    eyes = 3.0 * torch.eye(9, dtype=torch.float64), 7.0 * torch.eye(14, dtype=torch.float64)
    other = factorize(weight, left=eyes[0], right=eyes[1], rank=3)
    torch.testing.assert_close(one.up @ one.down, other.up @ other.down)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_factors_are_balanced(shape, method):
    found = factorize(random(*shape), rank=4, **metrics(method, shape)[2])
    torch.testing.assert_close(found.up.norm(dim=0), found.down.norm(dim=1))


@pytest.mark.parametrize("form", ["inner", "outer"])
def test_scaling_a_metric_changes_nothing(form):
    weight, (left, right) = random(10, 12), moments((10, 12))
    one, other = (factorize(weight, left=left / size, right=right * size, rank=4, form=form) for size in (1.0, 1e-9))
    torch.testing.assert_close(one.up @ one.down, other.up @ other.down, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["inner", "outer"])
def test_fewer_tokens_than_features(shape, form):
    weight, x = random(*shape), samples(shape[1], tokens=5)
    factors = factorize(weight, right=x.T @ x, rank=5, form=form)
    assert torch.isfinite(factors.up).all()
    assert torch.isfinite(factors.down).all()
    # Five tokens span five directions: rank 5 loses nothing of them.
    assert output_error(weight, factors.up @ factors.down, x.T @ x) < 1e-3
    assert weight_error(weight, factors.up, factors.down) < 1.5


@pytest.mark.parametrize("form", ["inner", "outer"])
def test_dead_features(form):
    weight, x = random(12, 12), samples(12)
    x[:, [2, 7]] = 0.0
    covariance = x.T @ x
    factors = factorize(weight, right=covariance, rank=6, form=form)
    assert torch.isfinite(factors.up @ factors.down).all()
    # What the dead features would bring cannot matter: the same as without them.
    alive = [index for index in range(12) if index not in (2, 7)]
    fewer, less = weight[:, alive], covariance[alive][:, alive]
    without = factorize(fewer, right=less, rank=6)
    expected = output_error(fewer, without.up @ without.down, less)
    assert output_error(weight, factors.up @ factors.down, covariance) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("form", ["inner", "outer"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_metric_of_zeros_leaves_the_plain_truncation(form, side):
    weight, size = random(8, 10), {"left": 8, "right": 10}[side]
    for zeros in (torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)):
        found = factorize(weight, rank=3, form=form, **{side: zeros})
        expected = factorize(weight, rank=3)
        torch.testing.assert_close(found.up @ found.down, expected.up @ expected.down)
        assert not found.discarded.any()


def test_an_indefinite_covariance_gets_more_damping():
    weight, x = random(14, 10), samples(10)
    covariance = x.T @ x
    # As rounding in a lower precision would leave it: one eigenvalue just below zero.
    values, vectors = torch.linalg.eigh(covariance)
    values[0] = -1e-7 * float(covariance.diagonal().mean())
    factors = factorize(weight, right=vectors @ torch.diag(values) @ vectors.T, rank=4, form="inner")
    error = output_error(weight, factors.up @ factors.down, covariance)
    assert error == pytest.approx(relative(factorize(weight, right=covariance).output, 4), rel=1e-2)


def test_a_solver_that_never_converges_leaves_the_plain_truncation(monkeypatch):
    weight, (left, right) = random(14, 10), moments((14, 10))
    expected, inner, tried = factorize(weight, rank=4), module._inner, []

    def fail(exact, g, c, *arguments, **options):
        if g.matrix is None:
            return inner(exact, g, c, *arguments, **options)
        tried.append(c.shift)
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(module, "_inner", fail)
    found = factorize(weight, left=left, right=right, rank=4)
    torch.testing.assert_close(found.up @ found.down, expected.up @ expected.down)
    assert tried == sorted(tried)
    assert len(tried) == 4
    error = weight - found.up @ found.down
    assert float(found.discarded[4]) == pytest.approx(float(torch.trace(left @ error @ right @ error.T)), rel=1e-9)
    assert float(found.output[4]) == pytest.approx(float(torch.trace(error @ right @ error.T)), rel=1e-9)


@pytest.mark.parametrize("shape", [(120, 90), (90, 120)])
@pytest.mark.parametrize("method", METHODS)
def test_a_low_rank_at_random_is_nearly_the_best(shape, method):
    # A spectrum that falls as those of trained weights do.
    weight = random(shape[0], 90) * torch.arange(1, 91).double().pow(-1.0) @ random(90, shape[1], seed=3)
    arguments = metrics(method, shape)[2]
    exact, near = factorize(weight, rank=9, **arguments), factorize(weight, rank=9, solver="random", **arguments)
    assert float(near.discarded[9]) <= 1.001 * float(exact.discarded[9])
    torch.testing.assert_close(near.spectrum, exact.spectrum[:9], rtol=1e-3, atol=0)
    torch.testing.assert_close(near.output[0], exact.output[0])
    again = factorize(weight, rank=9, solver="auto", **arguments)
    assert torch.equal(again.up, near.up)
    assert not torch.equal(factorize(weight, rank=20, solver="auto", **arguments).up[:, :9], near.up)


def test_a_weight_of_low_rank_is_kept_whole():
    weight, x = random(20, 3) @ random(3, 12, seed=3), samples(12)
    factors = factorize(weight, right=x.T @ x, rank=3)
    assert output_error(weight, factors.up @ factors.down, x.T @ x) < 1e-7
    assert weight_error(weight, factors.up, factors.down) < 1e-6


def test_a_weight_of_zeros():
    zeros, covariance = torch.zeros(6, 8), torch.eye(8, dtype=torch.float64)
    factors = factorize(zeros, right=covariance, rank=2)
    assert not (factors.up @ factors.down).any()
    assert weight_error(zeros, factors.up, factors.down) == 0.0
    assert output_error(zeros, factors.up @ factors.down, covariance) == 0.0
    assert relative(factors.output, 2) == 0.0


def test_more_rank_never_loses_more():
    weight, (left, right) = random(15, 20), moments((15, 20))
    found = factorize(weight, left=left, right=right, left_damping=0.3)
    assert (found.discarded.diff() <= 0).all()
    assert (found.output.diff() <= 0).all()
    assert float(found.discarded[-1]) == 0.0


def test_errors_of_one_pair_of_factors():
    weight, x = random(16, 24), samples(24)
    other = random(16, 24, seed=5)
    measured = float((x @ (weight - other).T).norm() / (x @ weight.T).norm())
    assert output_error(weight, other, x.T @ x) == pytest.approx(measured, rel=1e-9)
    up, down = random(16, 2), random(2, 24)
    assert weight_error(weight, up, down) == pytest.approx(float((weight - up @ down).norm() / weight.norm()))


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


def test_uniform_rank_is_not_at_the_mercy_of_rounding():
    assert uniform_rank(0.6, 100, 100) == 30
    assert uniform_rank(0.7, 100, 100) == 35
    assert uniform_rank(0.8, 4096, 11008) == math.floor(0.8 * 4096 * 11008 / (4096 + 11008))
