import logging
import warnings

import pytest
import torch
from torch import Tensor, nn

from skink.errors import ExportError
from skink.export.onnx.convert import convert, interface
from skink.export.onnx.prepare import Prepared, prepare
from skink.graph.capture import capture


def test_weights_are_not_read_before_the_model_is_saved(monkeypatch):
    def read(self, name):
        raise AssertionError(name)

    monkeypatch.setattr(Prepared, "weight", read)
    model = convert(prepare(capture(nn.Linear(3, 2), (torch.zeros(2, 3),))))
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert tensors["weight"].shape == (2, 3)
    with pytest.raises(AssertionError, match="weight"):
        tensors["weight"].numpy()


def test_any_operator_of_pytorch_may_occur_and_dims_stay_dynamic():
    class Exotic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[1]).expand(x.shape[0], -1)
            return torch.logsumexp(x, -1) + positions.roll(1, 1).cumsum(1)

    model = convert(prepare(capture(Exotic(), (torch.zeros(2, 5, 3),))))
    described = interface(model)
    assert described["inputs"] == {"x": {"dtype": "float", "shape": ["batch", "sequence", "3"]}}
    assert described["outputs"] == {"output_0": {"dtype": "float", "shape": ["batch", "sequence"]}}


def test_what_pytorch_decomposes_is_traced_to_the_models_own_operator():
    class Bessel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(ExportError) as caught:
        convert(prepare(capture(Bessel(), (torch.zeros(2, 5),))))
    assert caught.value.code == "EXPORT-001"
    assert caught.value.what == "aten.special_bessel_j0.default has no ONNX form."
    assert "test_convert.py:" in caught.value.where
    assert caught.value.fix


def test_the_exporters_remarks_are_kept_from_the_user(caplog, capsys):
    before = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(prepare(capture(nn.Linear(3, 2), (torch.zeros(2, 3),))))
    assert [str(entry.message) for entry in caught] == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert capsys.readouterr().out == ""
    assert logging.getLogger("torch.onnx").level == before
