"""Capture of Hugging Face decoders, against transformers' own."""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, masking_utils

from skink.errors import CaptureError
from skink.graph.capture import capture
from skink.graph.huggingface import classify_mask
from skink.graph.program import Stage
from skink.kernels import ATTENTION
from tests import conftest
from tests.models import FAMILIES, build
from tests.programs import batch, captured, distance, eager, eager_logits

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def test_logits_equal_eager(family: str) -> None:
    program = captured(family)
    assert program.stage is Stage.CAPTURED
    assert [(entry.name, entry.dims) for entry in program.inputs] == [
        (name, ("B", "T")) for name in ("input_ids", "attention_mask", "position_ids")
    ]
    for inputs in (batch(3, 11, padding=4), batch(1, 1), batch(1, 23)):
        (logits,) = program(*inputs)
        assert logits.dtype is torch.float32
        assert distance(logits, eager_logits(family, inputs), inputs.attention_mask) < 1e-5


def test_attention_is_one_op_for_each_layer(family: str) -> None:
    found = [node for node in captured(family).graph.nodes if str(node.target) == "skink.attention.default"]
    assert len(found) == 2
    arguments = [ATTENTION.bind(node.args, node.kwargs) for node in found]
    windows = {"gemma2": [5, 0], "mistral": [5, 5], "phi3": [5, 5]}.get(family, [0, 0])
    assert [entry["window"] for entry in arguments] == windows
    assert all(entry["causal"] for entry in arguments)
    assert [entry["softcap"] for entry in arguments] == [50.0 if family == "gemma2" else 0.0] * 2


def fingerprint(model: nn.Module) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "weights": fingerprint(model),
        "storage": [tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]],
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "config": str(model.config),
        "attention": model.config._attn_implementation,
        "experts": getattr(model.config, "_experts_implementation", None),
        "caching": model.config.use_cache,
    }


@pytest.mark.parametrize(("name", "training"), [("llama", True), ("mixtral", False)])
def test_the_model_is_left_as_it_was(name: str, training: bool) -> None:
    model = build(name).train(training)
    inputs = batch(2, 7)
    before = state_of(model)
    program = capture(model)
    program(*inputs)
    assert state_of(model) == before
    with torch.no_grad():
        logits = model.eval()(**inputs._asdict()).logits
    assert distance(logits, eager_logits(name, inputs), inputs.attention_mask) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_casts_follow_the_weights(family: str, dtype: torch.dtype) -> None:
    program, reference = captured(family), build(family)
    reference.set_attn_implementation("eager")
    for name, weight in list(program.weights()):
        if name not in program.buffers:
            program.set_weight(name, weight.to(dtype))
    for parameter in reference.parameters():  # buffers stay in float32, as transformers leaves them when it loads
        parameter.data = parameter.data.to(dtype)
    inputs = batch(3, 11, padding=4)
    (found,) = program(*inputs)
    with torch.no_grad():
        theirs = reference(**inputs._asdict()).logits
    exact = eager_logits(family, inputs)
    assert found.dtype is theirs.dtype is dtype
    real = inputs.attention_mask.bool()
    rounding = (theirs.float() - exact)[real].norm()
    assert 0 < rounding < 0.2 * exact[real].norm()
    assert (found.float() - exact)[real].norm() < 1.3 * rounding
    assert (found.float() - theirs.float())[real].norm() < 1.5 * rounding


def test_a_model_in_bfloat16_is_captured_as_one() -> None:
    model = build("llama").to(torch.bfloat16)
    inputs = batch(2, 9)
    program = capture(model)
    (logits,) = program(*inputs)
    with torch.no_grad():
        theirs = model(**inputs._asdict()).logits
    assert program.dtype is logits.dtype is torch.bfloat16
    assert (logits - theirs).abs().max() <= 2**-5 * theirs.abs().max()


def test_meta_weights() -> None:
    config = AutoConfig.for_model("llama", **SMALL)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    program = capture(model)
    assert program.is_meta
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.state_dict().items():
        program.set_weight(name, weight)
    program.set_weight("model.rotary_emb.inv_freq", model.model.rotary_emb.inv_freq, buffer=True)
    inputs = batch(2, 5)
    with torch.no_grad():
        wanted = model(**inputs._asdict()).logits
    assert distance(program(*inputs)[0], wanted, inputs.attention_mask) < 1e-5


MEMORY = """
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from skink.evaluation import peak_memory
from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.passes.canonicalize import Canonicalize
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2))
program = capture(model)
Pipeline((Canonicalize(),)).run(program)
print(sum(weight.nbytes for _, weight in program.weights()), peak_memory())
"""


def test_capture_takes_no_memory_for_weights() -> None:
    folder = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", MEMORY], cwd=folder, capture_output=True, text=True, check=True)
    weights, peak = map(int, result.stdout.split())
    assert weights > 2.5e9
    assert peak < 1e9


def test_biases_and_grouped_heads() -> None:
    model = build("llama", attention_bias=True, mlp_bias=True, num_key_value_heads=1)
    model.set_attn_implementation("eager")
    inputs = batch(2, 6, padding=2)
    program = capture(model)
    with torch.no_grad():
        wanted = model(**inputs._asdict()).logits
    assert {"model.layers.0.self_attn.k_proj.bias", "model.layers.1.mlp.up_proj.bias"} <= set(dict(program.weights()))
    assert program.weight("model.layers.0.self_attn.k_proj.weight").shape == (16, 64)
    assert distance(program(*inputs)[0], wanted, inputs.attention_mask) < 1e-5


@pytest.mark.parametrize("distance_back", [1, 2, 5, 63, 100, 4096])
def test_windows_are_recognised(distance_back: int) -> None:
    mask = masking_utils.sliding_window_causal_mask_function(distance_back)
    assert classify_mask(mask) == (True, distance_back)


def test_causal_and_bidirectional_masks_are_recognised() -> None:
    assert classify_mask(masking_utils.causal_mask_function) == (True, 0)
    assert classify_mask(lambda batch, head, query, key: key >= 0) == (False, 0)


def raises(*_: Any) -> None:
    raise RuntimeError("no mask")


@pytest.mark.parametrize(
    "mask",
    [
        lambda batch, head, query, key: (key <= query) & (key // 16 == query // 16),
        lambda batch, head, query, key: (key <= query) & (key // 8192 == query // 8192),
        lambda batch, head, query, key: (key <= query) | (key < 10),
        lambda batch, head, query, key: (key - query).abs() < 8,
        lambda batch, head, query, key: key >= query,
        lambda batch, head, query, key: (key <= query) & ((key > query - 8) | (key < 4)),
        lambda batch, head, query, key: key < query,
        raises,
    ],
    ids=["chunks", "long-chunks", "prefix", "band", "upper", "sinks", "strict", "raises"],
)
def test_other_masks_are_not(mask: Callable[..., Any]) -> None:
    assert classify_mask(mask) is None


def test_a_model_with_a_chunked_mask_is_refused() -> None:
    options = {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 16}
    config = AutoConfig.for_model("llama4_text", **SMALL, num_key_value_heads=1, **options)
    with pytest.raises(CaptureError, match=r"\[CAPTURE-003\].*none of causal, causal with a window, and bidirection"):
        capture(AutoModelForCausalLM.from_config(config))


def test_a_position_bias_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    attention = type(model.model.layers[0].self_attn)
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *a, **k: forward(self, *a, **k, position_bias=torch.ones(1)))
    with pytest.raises(CaptureError, match=r"\[CAPTURE-003\] LlamaAttention adds a position bias"):
        capture(model)


def test_masks_made_outside_the_interface_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    layer = type(model.model.layers[0])
    forward = layer.forward

    def with_own_mask(self: Any, hidden: Any, attention_mask: Any = None, **rest: Any) -> Any:
        return forward(self, hidden, attention_mask=attention_mask & attention_mask, **rest)

    monkeypatch.setattr(layer, "forward", with_own_mask)
    with pytest.raises(CaptureError, match=r"\[CAPTURE-003\] LlamaAttention builds its attention mask itself"):
        capture(model)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_models_without_a_causal_head_are_refused(kind: str) -> None:
    options = {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 2, "d_kv": 16, "vocab_size": 97}
    config = AutoConfig.for_model(kind, **(options if kind == "t5" else SMALL))
    with pytest.raises(CaptureError, match=r"\[CAPTURE-004\]"):
        capture(AutoModel.from_config(config))


def test_plain_modules_need_example_inputs() -> None:
    with pytest.raises(CaptureError, match=r"\[CAPTURE-004\] Linear is not a Hugging Face model") as caught:
        capture(nn.Linear(2, 2))
    assert "example_inputs=" in caught.value.fix


def test_bidirectional_attention_is_captured_as_such() -> None:
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SMALL)).eval()
    model.set_attn_implementation("eager")
    inputs = batch(2, 9, padding=3)
    program = capture(model)
    (node,) = [node for node in program.graph.nodes if str(node.target) == "skink.attention.default"]
    with torch.no_grad():
        wanted = model(**inputs._asdict()).logits
    assert ATTENTION.bind(node.args, node.kwargs)["causal"] is False
    assert distance(program(*inputs)[0], wanted, inputs.attention_mask) < 1e-5


def test_all_families_are_tested() -> None:
    assert tuple(FAMILIES) == conftest.FAMILIES


def test_the_reference_model_is_plain() -> None:
    assert eager("llama").config._attn_implementation == "eager"
