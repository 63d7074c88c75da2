import sys

import pytest
import torch
from torch import Tensor, nn

import skink.kernels
from skink.errors import ExportError
from skink.export.onnx.prepare import cast_program, export_dtype, prepare
from skink.graph.capture import capture
from skink.graph.pattern import op_name
from skink.graph.state import derive_step
from skink.kernels import Cost, OpDef
from tests.export.onnx.exported import program


def _calls(prepared, name):
    return [node for node in prepared.program.graph.nodes if op_name(node) == f"skink_onnx.{name}"]


def test_weights_have_shapes_only_and_are_read_one_at_a_time():
    stepped = derive_step(program("gemma2"))
    prepared = prepare(stepped)
    assert all(tensor.is_meta for _, tensor in prepared.program.weights())
    for name, tensor in prepared.program.weights():
        value = prepared.weight(name)
        assert (value.shape, value.dtype) == (tensor.shape, tensor.dtype)
    name = "model.norm.weight"
    torch.testing.assert_close(prepared.weight(f"{name}_plus_1"), stepped.weight(name) + 1)
    assert not stepped.is_meta


def test_no_op_of_ours_is_left_and_no_size_is_read():
    prepared = prepare(derive_step(program("llama")))
    names = {op_name(node) for node in prepared.program.graph.nodes}
    assert not {name for name in names if name.startswith("skink.")}
    assert "reshape" not in names
    assert "sym_size" not in names
    assert all(node.target in prepared.translations for node in _calls(prepared, "attention"))


def test_layers_of_a_kind_share_their_mask():
    assert len(_calls(prepare(derive_step(program("mistral"))), "attention_mask")) == 1
    masks = _calls(prepare(derive_step(program("gemma2"))), "attention_mask")
    assert [node.args[3:] for node in masks] == [(True, 5), (True, 0)]


def test_reshapes_are_written_in_numbers():
    sizes = {tuple(node.args[1]) for node in _calls(prepare(derive_step(program("llama"))), "reshape")}
    assert sizes == {(0, 0, 4, 16), (0, 0, 2, 16), (0, 0, 64)}


def test_rotary_tables_are_halved_where_they_repeat():
    prepared = prepare(derive_step(program("llama")))
    turns = _calls(prepared, "rotary_pairs")
    assert len(turns) == 4
    assert {node.args[1].meta["val"].shape[-1] for node in turns} == {8}
    assert len({node.args[1:3] for node in turns}) == 1
    assert not [node for node in prepared.program.graph.nodes if op_name(node) == "cat" and node.args[1] == -1]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_head_takes_the_last_tokens_only(family):
    prepared = prepare(derive_step(program(family)))
    (kept,) = _calls(prepared, "keep_last")
    # The last norm too is computed for those tokens alone.
    (norm,) = kept.users
    assert str(norm.target).startswith("skink_onnx.rms_norm")
    assert prepared.program.inputs[-1].name == "num_logits_to_keep"
    assert [node.target for node in prepared.program.graph.find_nodes(op="placeholder")][3] == "num_logits_to_keep"


def test_programs_without_state_keep_all():
    prepared = prepare(program("llama"))
    assert not _calls(prepared, "keep_last")
    assert len(prepared.program.inputs) == 3


@pytest.mark.parametrize(("dtype", "exported"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
def test_the_dtype_of_the_export(dtype, exported):
    stepped = derive_step(cast_program(program("llama"), dtype))
    assert export_dtype(stepped) is exported
    prepared = prepare(stepped)
    assert prepared.weight("model.norm.weight").dtype is exported
    assert bool(prepared.notes) == (dtype is not exported)
    # What is computed in float32 whatever the weights are stays in float32.
    assert prepared.weight("model.rotary_emb.inv_freq").dtype is torch.float32


def test_a_cast_program_shares_what_fits_already():
    source = program("llama")
    same = cast_program(source, torch.float32)
    assert all(tensor.data_ptr() == source.weight(name).data_ptr() for name, tensor in same.weights())
    half = cast_program(source, torch.float16)
    assert half.weight("model.norm.weight").dtype is torch.float16
    assert source.weight("model.norm.weight").dtype is torch.float32


def test_an_op_without_a_lowering_is_named(monkeypatch):
    def reference(input: Tensor) -> Tensor:
        return input * 2

    op = OpDef(
        name="doubled_in_a_test",
        schema="doubled_in_a_test(Tensor input) -> Tensor",
        reference=reference,
        fake=torch.empty_like,
        tolerance={},
        cost=lambda arguments: Cost(0, 0),
    )
    monkeypatch.setitem(skink.kernels._BY_TARGET, op.overload, op)

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.skink.doubled_in_a_test(x)

    captured = capture(Twice(), (torch.zeros(2, 3),))
    with pytest.raises(ExportError) as caught:
        prepare(captured)
    assert caught.value.code == "EXPORT-001"
    assert "skink.doubled_in_a_test" in caught.value.what
    assert "doubled_in_a_test" in caught.value.where
    assert "onnx_lowering" in caught.value.fix
    # With a lowering beside the reference, it is found.
    beside = type(sys)(f"{__name__.rpartition('.')[0]}.onnx_lowering")
    beside.doubled_in_a_test = lambda input: input
    monkeypatch.setitem(sys.modules, beside.__name__, beside)
    assert beside.doubled_in_a_test in prepare(captured).translations.values()
