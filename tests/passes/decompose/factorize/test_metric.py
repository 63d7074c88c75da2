import pytest
import torch

from skink.passes.decompose.factorize.metric import Metric


def some(size, seed=0):
    root = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T


@pytest.mark.parametrize("kind", ["full", "diagonal", "identity"])
def test_products_with_the_matrix_and_its_root(kind):
    matrix = some(5)
    given = {"full": matrix, "diagonal": matrix.diagonal().clone(), "identity": None}[kind]
    expected = {"full": matrix, "diagonal": torch.diag(matrix.diagonal()), "identity": torch.eye(5).double()}[kind]
    shift = 0.0 if given is None else 0.1 * float(matrix.diagonal().mean())
    expected = expected + shift * torch.eye(5).double()
    metric, rows = Metric(given, 0.1), torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(metric.times(rows.T), expected @ rows.T)
    through = metric.through_root(rows)
    torch.testing.assert_close(through @ through.T, rows @ expected @ rows.T)
    torch.testing.assert_close(metric.back_through_root(through), rows)
    assert metric.shift == pytest.approx(shift)


def test_what_is_given_is_not_changed():
    matrix = some(4)
    before = matrix.clone()
    Metric(matrix, 0.5).through_root(torch.eye(4).double())
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("matrix", [torch.tensor([1.0, -1.0, 4.0]), torch.diag(torch.tensor([1.0, -1.0, 4.0]))])
def test_an_indefinite_metric_has_no_root(matrix):
    metric = Metric(matrix.double())
    assert not metric.is_zero
    with pytest.raises(torch.linalg.LinAlgError):
        metric.through_root(torch.eye(3).double())


def test_a_metric_that_measures_nothing():
    assert Metric(torch.zeros(3, 3)).is_zero
    assert Metric(torch.zeros(3)).is_zero
    assert not Metric(None).is_zero
