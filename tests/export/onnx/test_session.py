import numpy as np
import onnx
import pytest

from skink.errors import ExportError
from skink.export.onnx.session import OrtGraph
from tests.export.onnx.exported import exported


@pytest.fixture(scope="module")
def graph():
    return OrtGraph(exported("gemma2").folder, threads=1)


def _feeds(length, past=0):
    ids = np.arange(2 * length).reshape(2, length) % 90
    return {
        "input_ids": ids,
        "attention_mask": np.ones((2, past + length), np.int64),
        "position_ids": np.tile(np.arange(past, past + length), (2, 1)),
    }


def test_the_first_state_is_empty_on_growing_axes(graph):
    assert [tuple(value.shape()) for value in graph.empty_state(2)] == [(2, 2, 0, 16)] * 4
    assert [entry.name for entry in graph.state_inputs][:2] == ["past_key_values.0.key", "past_key_values.0.value"]


def test_outputs_and_state_after_a_run(graph):
    outputs, state = graph.run(_feeds(7), graph.empty_state(2))
    assert list(outputs) == ["logits"]
    assert outputs["logits"].shape == (2, 7, 97)
    assert [value.shape()[2] for value in state] == [4, 4, 7, 7]  # a window of five, then all


def test_a_state_given_is_left_as_it_was(graph):
    _, state = graph.run(_feeds(7), graph.empty_state(2))
    before = [value.numpy().copy() for value in state]
    graph.run(_feeds(1, past=7), state)
    assert all(np.array_equal(value.numpy(), kept) for value, kept in zip(state, before))


def test_inputs_need_not_be_contiguous(graph):
    feeds = _feeds(7)
    whole, _ = graph.run(feeds, graph.empty_state(2))
    strided = {name: np.asfortranarray(array) for name, array in feeds.items()}
    again, _ = graph.run(strided, graph.empty_state(2))
    assert np.array_equal(whole["logits"], again["logits"])


def test_logits_of_the_last_tokens(graph):
    every, _ = graph.run(_feeds(7), graph.empty_state(2))
    last, _ = graph.run(_feeds(7), graph.empty_state(2), logits_to_keep=2)
    assert last["logits"].shape == (2, 2, 97)
    np.testing.assert_allclose(last["logits"], every["logits"][:, -2:], rtol=1e-5, atol=1e-5)


def test_a_graph_that_keeps_its_state_to_itself_is_refused(tmp_path):
    for path in exported("gemma2").folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    kept = [entry for entry in model.graph.output if entry.name != "present.1.value"]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError) as caught:
        OrtGraph(tmp_path)
    assert caught.value.code == "EXPORT-003"
    assert "present.1.value" in caught.value.what
