"""Capture of Hugging Face decoders, against transformers' own."""

import hashlib
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertForSequenceClassification,
    ViTConfig,
    ViTModel,
    masking_utils,
)
from transformers.models.llama import modeling_llama

from skink.errors import CaptureError, StateError
from skink.graph.capture import capture
from skink.graph.program import Program, Stage
from skink.graph.state import derive_step
from skink.kernels import ATTENTION
from tests import conftest
from tests.models import FAMILIES, build
from tests.programs import Batch, batch, captured, distance, eager, eager_logits

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


def prefix(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return key < 2


def test_a_mask_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_prefix = partial(masking_utils.create_causal_mask, or_mask_function=prefix)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", with_prefix)
    with pytest.raises(CaptureError, match=r"\[CAPTURE-003\].*none of causal, causal with a window, and bidirection"):
        capture(build("llama"))


def test_a_mask_of_another_kind_that_no_layer_reads_is_none() -> None:
    experts = {"num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1}
    # Its configuration turns windows off by one of length 0, whose mask lets nothing be seen.
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", **SMALL, **experts)).eval()
    assert model.config.sliding_window == 0
    check(model, batch(2, 9, padding=3))


def check(model: nn.Module, inputs: Batch, **others: Tensor) -> Program:
    """The model's program, with the logits (or hidden states) of plain attention."""
    program = capture(model)
    model.set_attn_implementation("eager")
    given = inputs._asdict() | others
    given = {entry.name: given[entry.name] for entry in program.inputs}
    with torch.no_grad():
        result = model(**given)
    found = dict(zip(program.outputs, program(*given.values()), strict=True))
    first = program.outputs[0]
    assert distance(found[first], getattr(result, first), inputs.attention_mask) < 1e-5
    if "pooler_output" in found:
        # Of the first token, which is one that counts where padding is behind.
        real = inputs.attention_mask[:, 0] == 1
        torch.testing.assert_close(found["pooler_output"][real], result.pooler_output[real], rtol=1e-5, atol=1e-5)
    return program


def attentions(program: Program) -> list[dict[str, Any]]:
    found = [node for node in program.graph.nodes if str(node.target) == "skink.attention.default"]
    return [dict(ATTENTION.bind(node.args, node.kwargs)) for node in found]


def test_masks_that_depend_on_padding_alone_are_kept_as_tensors() -> None:
    # Llama 4 counts its chunks from the first token that is no padding.
    options = {"attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 16}
    config = AutoConfig.for_model("llama4_text", **SMALL, num_key_value_heads=1, **options)
    program = check(AutoModelForCausalLM.from_config(config).eval(), batch(2, 11, padding=3))
    assert not attentions(program)


@pytest.mark.parametrize("change", ["bias", "mask"])
def test_models_that_do_more_with_masks_keep_them_as_tensors(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    model = build("llama")
    attention = type(model.model.layers[0].self_attn)
    forward = attention.forward

    def changed(self: Any, *, attention_mask: Any, **rest: Any) -> Any:
        if change == "mask":
            return forward(self, attention_mask=attention_mask.clone(), **rest)
        return forward(self, attention_mask=attention_mask, position_bias=torch.zeros(1), **rest)

    monkeypatch.setattr(attention, "forward", changed)
    assert not attentions(check(model, batch(2, 9, padding=3)))


GPTJ = {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 97, "rotary_dim": 8}
BLOOM = {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 97}
MPT = {"d_model": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 97, "max_seq_len": 16, "expansion_ratio": 2}


@pytest.mark.parametrize(
    ("kind", "options", "inputs"),
    [
        ("gptj", GPTJ, 3),
        ("codegen", GPTJ | {"n_head": 4}, 3),
        ("falcon", SMALL, 3),
        ("bloom", BLOOM, 2),
        ("mpt", MPT, 2),
        ("openai-gpt", GPTJ, 3),
    ],
)
def test_attention_written_by_hand_is_captured_with_its_masks(kind: str, options: Any, inputs: int) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()
    program = check(model, batch(2, 11, padding=3))
    assert not attentions(program)
    assert len(program.inputs) == inputs
    assert program.any_dtype is (kind != "openai-gpt")


def test_a_table_of_masks_bounds_the_number_of_tokens() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("openai-gpt", **GPTJ)).eval()
    program = capture(model)
    assert program.origin["longest"] == {"T": 64}
    assert not program.any_dtype


def test_a_model_that_reads_tokens_in_a_loop_is_refused() -> None:
    config = AutoConfig.for_model("mamba", vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(CaptureError, match=r"CAPTURE-002.*MambaForCausalLM has not one graph for every number of"):
        capture(AutoModelForCausalLM.from_config(config))


def test_encoder_decoders_are_refused() -> None:
    options = {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 2, "d_kv": 16, "vocab_size": 97}
    with pytest.raises(CaptureError, match=r"\[CAPTURE-004\] T5Model is an encoder-decoder model"):
        capture(AutoModel.from_config(AutoConfig.for_model("t5", **options)))


def test_models_of_images_are_refused() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(CaptureError, match=r"\[CAPTURE-004\] ViTModel does not take token ids"):
        capture(ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)))


def test_plain_modules_need_example_inputs() -> None:
    with pytest.raises(CaptureError, match=r"\[CAPTURE-004\] Linear is not a Hugging Face model") as caught:
        capture(nn.Linear(2, 2))
    assert "example_inputs=" in caught.value.fix


@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModel], ids=["head", "none"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "albert"])
def test_encoders(kind: str, auto: Any) -> None:
    small = {**SMALL, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 2} if kind == "distilbert" else SMALL
    inputs = batch(3, 9, padding=3)
    kinds = (inputs.input_ids % 2).clamp(max=auto is not None and kind != "roberta")
    program = check(auto.from_config(AutoConfig.for_model(kind, **small)).eval(), inputs, token_type_ids=kinds)
    hidden = ("last_hidden_state",) if kind == "distilbert" else ("last_hidden_state", "pooler_output")
    assert program.outputs == (("logits",) if auto is AutoModelForMaskedLM else hidden)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    assert [entry.name for entry in program.inputs] == names[: 2 if kind == "distilbert" else 3]
    (found,) = attentions(program)
    assert found["causal"] is False
    with pytest.raises(StateError, match=r"STATE-00[12]"):
        derive_step(program)


def test_an_encoder_with_windows_keeps_its_masks() -> None:
    options = {"local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 3, "sep_token_id": 4}
    config = AutoConfig.for_model("modernbert", **SMALL | {"num_hidden_layers": 2}, **options)
    check(AutoModelForMaskedLM.from_config(config).eval(), batch(2, 11, padding=3))


def test_positions_may_begin_at_any_number() -> None:
    config = AutoConfig.for_model("nystromformer", **SMALL, num_landmarks=8, segment_means_seq_len=8)
    model = AutoModelForMaskedLM.from_config(config).eval()
    assert int(model.nystromformer.embeddings.position_ids[0, 0]) == 2
    inputs = batch(2, 9, padding=3)
    check(model, inputs, token_type_ids=torch.zeros_like(inputs.input_ids))


def test_positions_without_values_bound_the_number_of_tokens() -> None:
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SMALL))
    assert capture(model).origin["longest"] == {"T": 64}


def test_any_number_of_tokens_may_be_encoded() -> None:
    program = capture(AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SMALL)))
    assert "longest" not in program.origin


def test_classification_by_an_encoder() -> None:
    model = BertForSequenceClassification(AutoConfig.for_model("bert", **SMALL, num_labels=3)).eval()
    inputs = batch(2, 9)
    program = capture(model)
    with torch.no_grad():
        wanted = model(inputs.input_ids, inputs.attention_mask).logits
    kinds = torch.zeros_like(inputs.input_ids)
    torch.testing.assert_close(program(inputs.input_ids, inputs.attention_mask, kinds)[0], wanted)


def test_all_families_are_tested() -> None:
    assert tuple(FAMILIES) == conftest.FAMILIES


def test_the_reference_model_is_plain() -> None:
    assert eager("llama").config._attn_implementation == "eager"
