from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from skink.cli.inspect import _attention_text, _block_line, _state_elements, _state_text, folded_places
from skink.cli.inspection import Attention, Block, Layer
from skink.cli.leftovers import Leftover
from skink.graph.program import StateInput
from tests.cli.conftest import Run
from tests.models import build


@pytest.fixture(scope="module")
def inspected(run: Run, tiny: Path) -> dict[str, Any]:
    """What is said about the tiny model, with its graph."""
    done = run("inspect", tiny, "--graph", "--json")
    if done.code != 0:
        pytest.fail(done.stderr)
    found: dict[str, Any] = done.json
    return found


def test_a_layer_is_listed_with_all_its_parts(inspected: dict[str, Any]) -> None:
    first, second, outside = inspected["layers"]
    assert (first["name"], second["name"], outside["name"]) == ("model.layers.0", "model.layers.1", "")
    assert first["attention"] == [
        {
            "heads": 4,
            "kv_heads": 2,
            "head_size": 8,
            "causal": True,
            "window": 0,
            "softcap": 0.0,
            "sinks": False,
            "alibi": False,
        }
    ]
    assert [norm["name"] for norm in first["norms"]] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
    ]
    assert first["rotary"] == [{"count": 2, "rotated": 8, "head_size": 8, "interleaved": False}]
    (block,) = first["feed_forward"]
    assert (block["name"], block["kind"], block["activation"], block["width"]) == (
        "model.layers.0.mlp",
        "gated",
        "silu",
        64,
    )
    shapes = {linear["name"].rpartition(".")[2]: (linear["shape"], linear["parameters"]) for linear in first["linear"]}
    assert shapes["k_proj"] == ([16, 32], 512)
    assert shapes["down_proj"] == ([32, 64], 2048)
    assert [(state["name"], state["growth"]) for state in second["state"]] == [
        ("past_key_values.1.key", "append"),
        ("past_key_values.1.value", "append"),
    ]
    assert outside["linear"][0]["tied_to"] == "model.embed_tokens"
    assert inspected["refused"] == []
    assert inspected["totals"]["parameters"] == sum(layer["parameters"] for layer in inspected["layers"])


def test_without_weights_the_same_is_found(run: Run, tiny: Path, tmp_path: Path, inspected: dict[str, Any]) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tiny / "config.json").read_bytes())
    bare = run("inspect", tmp_path / "bare", "--meta", "--graph", "--json").json
    assert bare["meta"] is True
    assert inspected["meta"] is False
    assert {**bare, "meta": False, "model": ""} == {**inspected, "model": ""}


def test_a_skink_folder_shows_what_was_rewritten(run: Run, compressed: Path) -> None:
    found = run("inspect", compressed, "--json").json
    names = [linear["name"] for linear in found["layers"][0]["linear"]]
    assert "model.layers.0.self_attn.q_proj.down" in names
    assert "model.layers.0.self_attn.q_proj.up" in names
    assert found["stage"] == "rewritten"
    assert [block["activation"] for block in found["layers"][0]["feed_forward"]] == ["silu"]
    assert found["refused"] == []
    assert found["layers"][0]["attention"][0]["kv_heads"] == 2
    assert run("inspect", compressed, "--meta", "--json").json["totals"] == found["totals"]


def test_windows_soft_caps_and_the_stored_dtype_are_shown(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "gemma2"
    build("gemma2").to(torch.bfloat16).save_pretrained(folder)
    done = run("inspect", folder, "--json")
    assert done.code == 0, done.stderr
    found, first = done.json, done.json["layers"][0]
    assert first["attention"][0]["window"] == 5
    assert first["attention"][0]["softcap"] == 50.0
    assert first["norms"][0]["offset"] == 1.0
    assert {state["limit"] for state in first["state"]} == {4}
    assert found["dtype"] == "bfloat16"
    assert found["totals"]["bytes"] == 2 * found["totals"]["parameters"]


def test_the_graph_is_that_of_the_printer(inspected: dict[str, Any]) -> None:
    assert inspected["graph"].startswith("program canonical(%input_ids: i64[B,T]")
    assert "skink.attention(" in inspected["graph"]


def test_like_layers_are_shown_once(run: Run, compressed: Path) -> None:
    done = run("inspect", compressed, "--meta")
    assert done.code == 0, done.stderr
    assert "model.layers.0 to 1, 2 alike" in done.stdout
    assert done.stdout.count("self_attn.q_proj.down") == 1
    assert "tied to model.embed_tokens" in done.stdout
    assert "4 heads of 8, 2 key/value heads, causal" in done.stdout
    assert "key [B,2,P,8] append" in done.stdout


def test_attention_is_described_in_words() -> None:
    attention = Attention(
        heads=8, kv_heads=8, head_size=16, causal=False, window=5, softcap=50.0, sinks=True, alibi=True
    )
    assert _attention_text(attention) == "8 heads of 16, both ways, window 5, soft cap 50, sinks, ALiBi"


def test_experts_are_described_in_words() -> None:
    shared = Block("model.layers.0.mlp.shared", "gated", "silu", 40, gated=True)
    block = Block(
        "model.layers.0.mlp.experts", "experts", "relu2", 32, gated=False, experts=8, chosen=2,
        router="model.layers.0.mlp.gate", shared=(shared,),
    )  # fmt: skip
    assert _block_line(block, "model.layers.0") == (
        "experts",
        "8, 2 for each token, relu2, 32 wide, chosen by mlp.gate, and for every token gated silu, 40 wide",
    )
    assert _block_line(shared, "") == ("feed-forward", "gated silu, 40 wide")


def test_places_that_differ_in_their_layer_are_one() -> None:
    def place(module: str, source: str = "x.py:1") -> Leftover:
        return Leftover("norm", "rsqrt", module, source, f"%rsqrt, {module}", "")

    layers = [place(f"model.layers.{index}.norm") for index in (0, 1, 2, 5)]
    assert folded_places([*layers, place("model.norm"), place("model.layers.3.norm", "x.py:2")]) == [
        "model.layers.0 to 2, 5.norm (x.py:1)",
        "model.norm (x.py:1)",
        "model.layers.3.norm (x.py:2)",
    ]
    assert folded_places([place("")]) == ["%rsqrt, "]


def test_an_encoder_is_shown_with_why_it_cannot_be_stepped(run: Run, tmp_path: Path) -> None:
    options = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = AutoConfig.for_model("bert", num_attention_heads=2, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bert")
    done = run("inspect", tmp_path / "bert", "--meta")
    assert done.code == 0, done.stderr
    assert "both ways" in done.stdout
    assert "feed-forward  gelu, 64 wide" in done.stdout
    _, found, why = done.stdout.partition("Cannot be stepped")
    assert found
    assert "is not causal" in why


def test_a_ring_says_how_much_it_keeps() -> None:
    state = StateInput("past_key_values.0.key", 0, ("B", 2, "P4", 16), "ring", 2, 4)
    layer = Layer("model.layers.0", state=[state])
    assert _state_text(layer) == "key [B,2,P4,16] ring of the last 4 tokens"
    assert _state_elements(layer) == 32


def test_what_is_not_raised_is_said_with_its_reason(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
        # As the model's own, but for a factor that is computed.
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight + x.mean()) * (x * scale)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    done = run("inspect", tiny)
    assert done.code == 0, done.stderr
    _, found, listed = done.stdout.partition("Not raised")
    assert found
    assert "the factor is not a weight (5 places)" in listed
    assert "    model.layers.0 to 1.input_layernorm (cli/test_inspect.py:" in listed
    assert "    model.norm (cli/test_inspect.py:" in listed


def test_more_context_costs_more(run: Run, compressed: Path) -> None:
    arguments = ("inspect", compressed, "--meta", "--json", "--context")
    short, long = (run(*arguments, tokens).json["totals"]["macs_per_token"] for tokens in (10, 110))
    assert long - short == 2 * 4 * 8 * 2 * 100  # layers, heads, head size, QK and PV, tokens


def test_a_missing_model_is_an_error(run: Run, tmp_path: Path) -> None:
    for more in ((), ("--meta",)):
        done = run("inspect", tmp_path, *more, "--json")
        assert done.code == 1
        assert done.json["error"]["code"] == "MODEL-001"
