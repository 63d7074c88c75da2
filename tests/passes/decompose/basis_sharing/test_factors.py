import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skink.passes.decompose.basis_sharing.factors import coefficients, shared_basis, shared_rank


def matrix(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def metric(size, seed):
    root = matrix(size, size, seed=seed) * torch.logspace(-1, 1, size, dtype=torch.float64)
    return root.T @ root + torch.eye(size, dtype=torch.float64)


def setting(count, out, in_):
    weights = [matrix(out, in_, seed=10 + index) for index in range(count)]
    return (
        weights,
        [metric(in_, 20 + index) for index in range(count)],
        [metric(out, 30 + index) for index in range(count)],
    )


def energy(difference, left, right):
    return float(torch.trace(left @ difference @ right @ difference.T))


# Stacked weights that are taller and that are wider than their inputs: one eigenproblem each.
SHAPES = [(2, 12, 8), (2, 3, 16), (3, 6, 10)]


@pytest.mark.parametrize(("count", "out", "in_"), SHAPES)
@pytest.mark.parametrize("two_sided", [False, True])
def test_the_basis_is_that_of_the_stacked_weights(count, out, in_, two_sided):
    weights, inputs, outputs = setting(count, out, in_)
    total = sum(inputs)
    left = torch.block_diag(*outputs) if two_sided else torch.eye(count * out, dtype=torch.float64)
    rank = 3
    root, lower = torch.linalg.cholesky(left), torch.linalg.cholesky(total)
    mapped = root.T @ torch.cat(weights) @ lower
    first, values, last = torch.linalg.svd(mapped, full_matrices=False)
    best = torch.linalg.inv(root.T) @ (first[:, :rank] * values[:rank]) @ last[:rank] @ torch.linalg.inv(lower)
    given_outputs = outputs if two_sided else [None] * count
    basis = shared_basis(weights, total, given_outputs, rank=rank, output_damping=0.0)
    found = [coefficients(weight, basis, total, None).at(rank) @ basis for weight in weights]
    torch.testing.assert_close(torch.cat(found), best, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(basis.norm(dim=1), torch.ones(rank, dtype=torch.float64))


@pytest.mark.parametrize(("count", "out", "in_"), SHAPES)
def test_all_ranks_are_priced_at_once(count, out, in_):
    weights, inputs, outputs = setting(count, out, in_)
    basis = shared_basis(weights, sum(inputs), outputs)
    weight, own, gradients = weights[1], inputs[1], outputs[1]
    found = coefficients(weight, basis, own, gradients)
    for rank in (1, 2, len(basis) - 1):
        product = found.at(rank) @ basis[:rank]
        assert float(found.discarded[rank]) == pytest.approx(energy(weight - product, gradients, own), rel=1e-5)
    assert float(found.discarded[0]) == pytest.approx(energy(weight, gradients, own))
    assert (found.discarded.diff() <= 1e-9 * found.discarded[0]).all()


def test_coefficients_are_the_least_squares_for_the_layers_own_inputs():
    weights, inputs, _ = setting(2, 6, 10)
    basis = shared_basis(weights, sum(inputs), [None, None], rank=4)
    x = torch.linalg.cholesky(inputs[0]).T
    expected = torch.linalg.lstsq(x @ basis.T, x @ weights[0].T).solution.T
    torch.testing.assert_close(coefficients(weights[0], basis, inputs[0], None).at(4), expected, rtol=1e-5, atol=1e-6)


def test_one_layer_has_the_basis_of_its_own_factors():
    [weight], [inputs], _ = setting(1, 6, 10)
    basis = shared_basis([weight], inputs, [None], rank=2)
    lower = torch.linalg.cholesky(inputs)
    first, values, last = torch.linalg.svd(weight @ lower)
    best = (first[:, :2] * values[:2]) @ last[:2] @ torch.linalg.inv(lower)
    torch.testing.assert_close(coefficients(weight, basis, inputs, None).at(2) @ basis, best, rtol=1e-5, atol=1e-7)


def test_inputs_that_are_always_zero_change_nothing_else():
    weights, inputs, _ = setting(2, 6, 10)
    for one in inputs:
        one[3], one[:, 3] = 0, 0
    basis = shared_basis(weights, sum(inputs), [None, None])
    found = coefficients(weights[0], basis, inputs[0], None)
    assert torch.isfinite(found.at(10)).all()
    torch.testing.assert_close(found.at(10) @ basis, weights[0], rtol=1e-3, atol=1e-3)


def test_without_any_input_it_is_the_plain_svd():
    weights, zero = [matrix(6, 10), matrix(6, 10, seed=2)], torch.zeros(10, 10, dtype=torch.float64)
    basis = shared_basis(weights, zero, [None, None], rank=3)
    last = torch.linalg.svd(torch.cat(weights))[2][:3]
    torch.testing.assert_close(basis.T @ basis, last.T @ last)
    torch.testing.assert_close(coefficients(weights[0], basis, zero, None).at(3), weights[0] @ last.T @ last @ basis.T)


@given(st.floats(0.01, 1.0), st.integers(1, 4), st.integers(1, 300), st.integers(1, 300))
def test_the_rank_keeps_what_was_asked(keep, count, out, in_):
    rank = shared_rank(keep, count, out, in_)
    each = in_ + count * out
    assert rank * each <= keep * count * out * in_ + 1e-6
    assert (rank + 1) * each > keep * count * out * in_
