import pytest
import torch
from torch import nn

from skink.errors import CalibrationError
from skink.graph.capture import capture
from skink.graph.gradients import stream_moments
from skink.graph.passes import Context
from skink.graph.pipeline import Pipeline
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose.basis_sharing.statistics import Statistics, stream_statistics
from skink.passes.decompose.selection import linear_layers
from tests.graph.programs import canonical
from tests.models import VOCABULARY

NAMES = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(2)]


def text(count=4, length=12):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(4))


def linear():
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Linear(8, 6)).eval(), (torch.randn(3, 8),))
    Pipeline((Canonicalize(),)).run(program, verify=0)
    return program


def test_both_sides_and_what_makes_them_a_loss():
    program, windows = canonical("llama"), text()
    found = dict(stream_statistics(program, NAMES, "two-sided", Context(windows, seed=3)))
    expected = {name: both for part in stream_moments(program, windows, NAMES, seed=3) for name, both in part.items()}
    assert found.keys() == set(NAMES)
    for name, known in found.items():
        torch.testing.assert_close(known.inputs.total, expected[name].inputs.total)
        torch.testing.assert_close(known.output, expected[name].gradients.total)
        assert known.scale == pytest.approx(0.5 / 48**2)


def test_inputs_alone():
    x = torch.randn(20, 8)
    [(name, known)] = stream_statistics(linear(), ["0.weight"], "whitened", Context(x))
    assert name == "0.weight"
    assert known.output is None
    torch.testing.assert_close(known.inputs.total, x.double().T @ x.double())


def test_the_record_of_a_layer():
    program, x = linear(), torch.randn(20, 8)
    [layer], weight = linear_layers(program), program.weight("0.weight").double()
    [(_, known)] = stream_statistics(program, ["0.weight"], "whitened", Context(x))
    root = torch.randn(6, 6, dtype=torch.float64)
    both = Statistics(known.inputs, root @ root.T, 0.5 / (20 * 20))
    product = weight + 0.1 * torch.randn(6, 8, dtype=torch.float64)
    record = both.record(layer, weight, product, 2, 28)
    y, changed = x.double() @ weight.T, x.double() @ product.T
    assert (record.rank, record.parameters_after) == (2, 28)
    assert record.predicted_error == pytest.approx(float((changed - y).norm() / y.norm()))
    assert record.weight_error == pytest.approx(float((product - weight).norm() / weight.norm()))
    cost = torch.trace(root @ root.T @ (product - weight) @ (x.double().T @ x.double()) @ (product - weight).T)
    assert record.predicted_loss == pytest.approx(float(cost) / 800)
    assert known.record(layer, weight, product, 2, 28).predicted_loss is None


def test_without_text():
    with pytest.raises(CalibrationError) as caught:
        list(stream_statistics(linear(), ["0.weight"], "whitened", Context()))
    assert caught.value.code == "CALIBRATION-002"


def test_without_layers_no_text_is_read():
    assert list(stream_statistics(linear(), [], "two-sided", Context(torch.zeros(0)))) == []
