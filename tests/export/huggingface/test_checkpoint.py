import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from skink.errors import GraphError, ModelError
from skink.export.huggingface.checkpoint import (
    GRAPH_FILE,
    check_safetensors,
    check_weights,
    explain_load,
    read_config,
    read_graph,
    refuse_partial_load,
)
from skink.graph.serialization import program_to_json
from tests.programs import canonical


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.zeros(0)}, path)
    return path


def with_header(path: Path, change) -> None:
    """Rewrites a safetensors file's header."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = change(json.loads(data[8 : 8 + length]))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_safetensors(path)
    assert caught.value.code == "MODEL-002"
    assert caught.value.what == f"{path.name} is damaged or was not copied whole."
    assert caught.value.where == str(path)
    return caught.value.why


def test_a_whole_file_gives_its_names(weights: Path) -> None:
    assert check_safetensors(weights) == {"a", "b", "c"}


def test_every_truncation_is_seen(weights: Path) -> None:
    data = weights.read_bytes()
    for length in (0, 5, 8, 40, len(data) - 1):
        weights.write_bytes(data[:length])
        assert f"ends after {length} bytes" in refused(weights)


def test_bytes_too_many_are_seen(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes() + b"more")
    assert "where its header announces" in refused(weights)


def test_a_header_that_is_no_json_is_seen(weights: Path) -> None:
    data = bytearray(weights.read_bytes())
    data[8:12] = b"nope"
    weights.write_bytes(bytes(data))
    assert "its header cannot be read (JSONDecodeError)." in refused(weights)


def test_a_shape_that_its_bytes_do_not_have_is_seen(weights: Path) -> None:
    with_header(weights, lambda header: header | {"a": header["a"] | {"shape": [3, 5]}})
    assert "gives 'a' a size that its shape and dtype do not have" in refused(weights)


def test_a_gap_between_tensors_is_seen(weights: Path) -> None:
    with_header(weights, lambda header: {name: entry for name, entry in header.items() if name != "a"})
    assert "leaves a gap before" in refused(weights)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return tmp_path


def test_all_shards_are_looked_at(sharded: Path) -> None:
    assert [path.name[6:11] for path in check_weights(sharded)] == ["00001", "00002"]
    second = sharded / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is damaged"):
        check_weights(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors is missing\.") as caught:
        check_weights(sharded)
    assert caught.value.code == "MODEL-002"
    assert "places 1 tensors in it" in caught.value.why


def test_a_shard_without_its_tensor_is_named(sharded: Path) -> None:
    save_file({"other": torch.ones(3)}, sharded / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match="it lacks 'a'"):
        check_weights(sharded)


def test_an_index_that_leads_out_of_the_folder_is_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(ModelError, match=r"\.\./a\.safetensors is missing"):
        check_weights(sharded)


def test_a_damaged_index_is_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match=r"index\.json cannot be read"):
        check_weights(sharded)


def test_only_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ModelError, match=r"has its weights in pytorch_model\.bin, a pickle") as caught:
        check_weights(tmp_path)
    assert caught.value.code == "MODEL-003"
    assert caught.value.fix


def test_no_weights_at_all_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"model\.safetensors and model\.safetensors\.index\.json are missing"
    ) as caught:
        check_weights(tmp_path)
    assert caught.value.code == "MODEL-001"


def test_a_config_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing") as caught:
        read_config(tmp_path)
    assert (caught.value.code, caught.value.why) == ("MODEL-001", "it is empty.")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match=r"it holds notes\.txt\."):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config\.json names no model_type"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read_config(tmp_path) == {"model_type": "llama"}


def test_a_graph_is_read_with_weights_on_meta(tmp_path: Path) -> None:
    data = {"format": 1, "program": program_to_json(canonical("llama"))}
    (tmp_path / GRAPH_FILE).write_text(json.dumps(data))
    program = read_graph(tmp_path, {})
    assert program.is_meta
    assert program_to_json(program) == data["program"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a graph that Skink wrote, or it was damaged"),
        ('{"program": {}}', "is not a graph that Skink wrote, or it was damaged"),
        ('{"format": 2, "program": {}}', "is of format 2; this Skink reads format 1"),
        ('{"format": 1, "program": {"format": 1}}', "GRAPH-001"),
    ],
)
def test_a_damaged_graph_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / GRAPH_FILE).write_text(text)
    with pytest.raises(GraphError, match=message) as caught:
        read_graph(tmp_path, {})
    assert caught.value.code == "GRAPH-001"


def test_a_folder_without_a_graph_is_no_skink_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no graph\.json, so it is not a Skink model") as caught:
        read_graph(tmp_path, {})
    assert caught.value.code == "MODEL-001"


def test_missing_weights_are_refused() -> None:
    refuse_partial_load("here", {"missing_keys": set()})
    names = {f"layer.{index}" for index in range(7)}
    with pytest.raises(ModelError, match="7 weights of the model are not in the checkpoint") as caught:
        refuse_partial_load("here", {"missing_keys": names})
    assert caught.value.why == "missing: layer.0, layer.1, layer.2, layer.3, layer.4, ...."


def test_what_transformers_raises_is_explained() -> None:
    no_file = explain_load("a/b", OSError("a/b does not appear to have a file named model.safetensors\nand more"))
    assert (no_file.code, no_file.what) == ("MODEL-003", "'a/b' has no weights in safetensors.")
    other = explain_load("a/b", RuntimeError("size mismatch"))
    assert (other.code, other.why) == ("MODEL-002", "size mismatch")
