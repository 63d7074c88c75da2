import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from skink.errors import ExportError, GraphError, OutputError
from skink.export.onnx import check as checking
from skink.export.onnx import export_onnx
from skink.export.onnx.cases import make_cases, save_cases
from skink.export.onnx.prepare import Prepared, cast_program
from skink.graph.capture import capture
from skink.graph.program import Stage
from skink.graph.state import derive_step
from tests.export.onnx.exported import exported, program
from tests.models import FAMILIES, tiny

# Of the domain ai.onnx; a graph of a tiny decoder has no business using anything else.
_ALLOWED = set(
    [
        "Add",
        "And",
        "Attention",
        "Cast",
        "CastLike",
        "Compress",
        "Concat",
        "ConstantOfShape",
        "Cos",
        "Div",
        "Equal",
        "Erf",
        "Expand",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gelu",
        "Gemm",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "LayerNormalization",
        "Less",
        "LessOrEqual",
        "MatMul",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "OneHot",
        "Pow",
        "Range",
        "Reciprocal",
        "ReduceMean",
        "ReduceSum",
        "Relu",
        "Reshape",
        "RMSNormalization",
        "RotaryEmbedding",
        "Scan",
        "Shape",
        "Sigmoid",
        "Sin",
        "Slice",
        "Softmax",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Swish",
        "Tanh",
        "TopK",
        "Transpose",
        "Unique",
        "Unsqueeze",
        "Where",
        "Max",
        "Min",
        "ScatterElements",
        "ScatterND",
    ]
)


def _graph(family):
    return onnx.load(exported(family).folder / "model.onnx", load_external_data=False)


@pytest.fixture
def here(monkeypatch):
    """The check without a process of its own, which takes longer to start than all else."""
    monkeypatch.setattr(checking, "check_in_fresh_process", checking.compare)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens(family, tmp_path):
    cases, notes = make_cases(program(family), derive_step(program(family)), torch.float32)
    save_cases(cases, tmp_path / "cases")
    result = checking.compare(exported(family).folder, tmp_path / "cases", 1e-5)
    assert result.failures() == []
    assert (result.tokens, result.ties) == (96, 0)
    assert notes == []
    windowed = family in ("gemma2", "mistral", "phi3")
    assert [case.name for case in result.cases] == [
        "a padded batch, token by token",
        "a padded batch, in chunks",
        *(["past the window of 5 tokens"] if windowed else []),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_stock_operators(family):
    model = _graph(family)
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 23)}
    assert not model.functions
    assert {node.op_type for node in model.graph.node} - {"Constant"} <= _ALLOWED
    assert set(exported(family).operators) <= _ALLOWED


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_stored_once_beside_the_graph_under_their_names(family):
    stored = {
        entry.name: entry
        for entry in _graph(family).graph.initializer
        if entry.data_location == onnx.TensorProto.EXTERNAL
    }
    large = {name for name, tensor in program(family).weights() if tensor.nbytes > 256}
    assert {name.removesuffix("_plus_1") for name in stored} >= large
    values = sum(tensor.nbytes for _, tensor in program(family).weights())
    assert exported(family).bytes["model.onnx.data"] <= values
    # Nothing but a few sizes in the graph's own file.
    assert all(len(entry.raw_data) <= 256 for entry in _graph(family).graph.initializer if entry.name not in stored)


def test_tied_weights_are_stored_once():
    assert program("gpt2").aliases == {"lm_head.weight": "transformer.wte.weight"}
    names = [entry.name for entry in _graph("gpt2").graph.initializer]
    assert names.count("transformer.wte.weight") == 1
    assert "lm_head.weight" not in names


def test_names_and_dims_are_what_runtimes_expect():
    interface = exported("gemma2").interface
    shapes = {name: entry["shape"] for side in interface.values() for name, entry in side.items()}
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "position_ids": ["batch", "sequence"],
        "num_logits_to_keep": [],
        "past_key_values.0.key": ["batch", "2", "past_4", "16"],
        "past_key_values.0.value": ["batch", "2", "past_4", "16"],
        "past_key_values.1.key": ["batch", "2", "past", "16"],
        "past_key_values.1.value": ["batch", "2", "past", "16"],
        "logits": ["batch", "kept", "97"],
        "present.0.key": ["batch", "2", "present_4", "16"],
        "present.0.value": ["batch", "2", "present_4", "16"],
        "present.1.key": ["batch", "2", "total", "16"],
        "present.1.value": ["batch", "2", "total", "16"],
    }


def test_masks_and_rotary_tables_are_computed_once():
    operators = exported("mistral").operators
    assert operators["Attention"] == 2
    assert operators["RotaryEmbedding"] == 4
    assert (operators["LessOrEqual"], operators["Greater"], operators["Cos"], operators["Sin"]) == (1, 1, 1, 1)


def test_the_graph_says_nothing_about_the_machine_it_was_made_on():
    text = (exported("llama").folder / "model.onnx").read_bytes()
    assert b"site-packages" not in text
    assert b".py" not in text
    names = {node.name for node in _graph("llama").graph.node}
    assert "/model/layers/1/mlp/up_proj/MatMul" in names
    assert len(names) == len(_graph("llama").graph.node)


def test_a_model_is_captured_and_its_files_come_along_and_a_fresh_process_checks_it(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            with open(f"{folder}/tokenizer.json", "w") as file:
                file.write("{}")

    model, steps = tiny("llama"), []
    report = export_onnx(
        model, tmp_path / "out", tokenizer=Tokenizer(), progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert report.check is not None
    assert report.check.ok
    assert (report.check.tokens, report.check.ties) == (96, 0)
    assert report.check.relative < 1e-5
    assert set(report.bytes) == {path.name for path in (tmp_path / "out").iterdir()}
    assert set(report.bytes) == {
        "model.onnx", "model.onnx.data", "config.json", "generation_config.json", "tokenizer.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert json.dumps(report.as_json())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("here")
def test_a_wrong_weight_fails_the_check_and_leaves_no_folder(tmp_path, monkeypatch):
    right = Prepared.weight

    def wrong(self, name):
        tensor = right(self, name)
        if name == "model.layers.1.mlp.up_proj.weight":
            tensor = tensor.clone()
            tensor[3, 5] += 0.1
        return tensor

    monkeypatch.setattr(Prepared, "weight", wrong)
    with pytest.raises(ExportError) as caught:
        export_onnx(program("llama"), tmp_path / "out")
    assert caught.value.code == "EXPORT-002"
    assert "token by token: off by" in caught.value.why
    assert "at logits, row" in caught.value.why
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_leaves_no_folder(tmp_path, monkeypatch, error):
    def interrupted(_):
        assert [path.name for path in (tmp_path / "new").iterdir()] != []
        raise error

    monkeypatch.setattr("skink.export.onnx.export.convert", interrupted)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        export_onnx(program("llama"), tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_refused(tmp_path):
    with pytest.raises(OutputError) as caught:
        export_onnx(program("llama"), tmp_path)
    assert caught.value.code == "OUTPUT-001"


@pytest.mark.usefixtures("here")
def test_half_precision(tmp_path):
    report = export_onnx(cast_program(program("qwen3"), torch.float16), tmp_path / "out")
    assert report.dtype == "float16"
    assert report.interface["inputs"]["past_key_values.0.key"]["dtype"] == "float16"
    assert report.check is not None
    assert 0 < report.check.relative < 2e-2
    assert report.bytes["model.onnx.data"] < exported("qwen3").bytes["model.onnx.data"] * 0.6


@pytest.mark.usefixtures("here")
def test_bfloat16_becomes_float32(tmp_path):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(8, 6, dtype=torch.bfloat16)

        def forward(self, x):
            return self.project(x.to(torch.bfloat16)).to(torch.bfloat16).relu()

    report = export_onnx(capture(Layer(), (torch.randn(2, 5, 8),)), tmp_path / "out")
    assert report.dtype == "float32"
    assert any("exported as float32" in note and "bfloat16" in note for note in report.notes)
    assert report.interface["outputs"]["output_0"]["dtype"] == "float"
    assert report.check is not None
    assert report.check.relative < 1e-5


@pytest.mark.usefixtures("here")
def test_an_encoder_has_no_state(tmp_path):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).movedim(2, 0).transpose(2, 3)
            return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    report = export_onnx(capture(Encoder(), (torch.randn(2, 5, 8),)), tmp_path / "out")
    assert report.check is not None
    assert report.check.ok
    assert list(report.interface["inputs"]) == ["x"]
    assert report.operators["Attention"] == 1


def test_programs_without_values_or_already_stepped_are_refused(tmp_path):
    stepped = derive_step(program("llama"))
    assert stepped.stage is Stage.STEPPED
    with pytest.raises(ExportError) as caught:
        export_onnx(stepped, tmp_path / "out")
    assert caught.value.code == "EXPORT-001"
    meta = program("llama").clone()
    name, tensor = next(iter(meta.weights()))
    meta.set_weight(name, torch.empty_like(tensor, device="meta"))
    with pytest.raises(GraphError) as refused:
        export_onnx(meta, tmp_path / "out")
    assert refused.value.code == "GRAPH-002"
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_as_it_was():
    before = {name: tensor.clone() for name, tensor in tiny("gemma2").state_dict().items()}
    exported("gemma2")
    after = tiny("gemma2").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    weights = onnx.load(exported("gemma2").folder / "model.onnx")
    stored = {entry.name: onnx.numpy_helper.to_array(entry) for entry in weights.graph.initializer}
    np.testing.assert_array_equal(stored["model.norm.weight_plus_1"], before["model.norm.weight"].numpy() + 1)
