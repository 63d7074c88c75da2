"""Experts of transformers' models as one op: what is recognised, that the numbers stay, and what is left alone."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN

from skink.graph.capture import capture
from skink.graph.huggingface_experts import classify_gate
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.graph.serialization import program_from_json, program_to_json
from skink.graph.state import derive_step
from skink.kernels import EXPERTS
from skink.passes.canonicalize import Canonicalize
from skink.passes.lower.select_kernels import lower
from tests.graph.stepping import empty_state
from tests.models import VOCABULARY
from tests.programs import Batch, batch, distance

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "head_dim": 8, "num_hidden_layers": 1},
    "olmoe": {"num_experts": 4, "num_hidden_layers": 1},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 5},
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "head_dim": 8},
}
_SILU = {"activation": "silu", "gated": True}


@cache
def tiny_mixture(family: str) -> PreTrainedModel:
    """A tiny model of a family with experts, which compute as transformers wrote them. Not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **{**_COMMON, **_OPTIONS[family]})
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    return model


@cache
def _captured(family: str) -> Program:
    return capture(tiny_mixture(family))


def _calls(program: Program) -> list[dict[str, Any]]:
    nodes = [node for node in program.graph.nodes if node.target is EXPERTS.overload]
    return [EXPERTS.bind(node.args, node.kwargs) for node in nodes]


@pytest.fixture(params=_OPTIONS)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def _greedy(family: str, prompt: Batch, count: int) -> Tensor:
    """The tokens of transformers' own eager experts, without a cache."""
    tokens, mask = prompt.input_ids, prompt.attention_mask
    for _ in range(count):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = tiny_mixture(family)(
                input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    return tokens


def test_experts_are_one_op_with_the_models_numbers(family: str) -> None:
    program = _captured(family)
    calls = _calls(program)
    assert len(calls) == (2 if family in ("mixtral", "gpt_oss") else 1)
    assert not [node for node in program.graph.nodes if node.target is torch.ops.aten.bmm.default]
    for inputs in (batch(3, 11, padding=4), batch(1, 1)):
        with torch.no_grad():
            expected = tiny_mixture(family)(**inputs._asdict(), use_cache=False).logits
        (logits,) = program(*inputs)
        assert distance(logits, expected, inputs.attention_mask) < 1e-5


# DeepSeek's attention writes into parts of an empty tensor, which is another matter; GLM has its experts.
@pytest.mark.parametrize("family", [name for name in _OPTIONS if name != "deepseek_v3"])
def test_stepped_with_kernels_it_writes_the_same_tokens(family: str) -> None:
    program = _captured(family).clone()
    Pipeline((Canonicalize(),)).run(program, verify=1)
    stepped, choices = lower(derive_step(program))
    assert [choice.kernel for choice in choices if choice.op == "experts"] == ["torch"] * len(_calls(program))
    prompt = batch(2, 7, padding=2)
    expected = _greedy(family, prompt, 6)
    tokens, state, begin = prompt.input_ids, empty_state(stepped, 2), 0
    for _ in range(6):
        mask = torch.cat((prompt.attention_mask, torch.ones(2, tokens.shape[1] - 7, dtype=torch.int64)), 1)
        whole = Batch(tokens, mask, (mask.cumsum(1) - 1).clamp(min=0))
        logits, *state = stepped(*whole.part(begin, tokens.shape[1]), *state)
        begin = tokens.shape[1]
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(tokens, expected)


def test_options_are_those_of_the_class() -> None:
    (first, _) = _calls(_captured("gpt_oss"))
    found = {name: first[name] for name in ("interleaved", "transposed", "limit", "alpha", "shift")}
    assert found == {"interleaved": True, "transposed": True, "limit": 7.0, "alpha": 1.702, "shift": 1.0}
    assert first["up"].target == "model.layers.0.mlp.experts.gate_up_proj"
    assert first["down_bias"].target == "model.layers.0.mlp.experts.down_proj_bias"
    (first, _) = _calls(_captured("mixtral"))
    assert (first["activation"], first["gated"], first["transposed"], first["limit"]) == ("silu", True, False, 0.0)
    assert first["up_bias"] is None


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_program_with_experts_is_written_cloned_and_emitted(family: str) -> None:
    program, inputs = _captured(family), batch(2, 5)
    (expected,) = program(*inputs)
    read = program_from_json(json.loads(json.dumps(program_to_json(program))), dict(program.weights()))
    assert str(read) == str(program) == str(program.clone())
    assert torch.equal(read(*inputs)[0], expected)
    module = program.module()
    names = {name for name, _ in module.named_parameters()}
    assert {call["up"].target for call in _calls(program)} <= names
    module(*inputs).square().mean().backward()
    gradient = module.get_parameter(str(_calls(program)[0]["up"].target)).grad
    assert gradient is not None
    assert bool(gradient.abs().amax(dim=(1, 2)).gt(0).any())


def _halves(act: Any) -> Any:
    def gate(hidden: Tensor) -> Tensor:
        one, other = hidden.chunk(2, -1)
        return act(one) * other

    return gate


@pytest.mark.parametrize(
    ("name", "activation"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_new", "gelu_tanh"),
     ("relu", "relu"), ("relu2", "relu2")],
)  # fmt: skip
def test_activations_are_told_apart(name: str, activation: str) -> None:
    for gated in (True, False):
        function = _halves(ACT2FN[name]) if gated else ACT2FN[name]
        found = classify_gate(function, gated=gated, numbers=(7.0,))
        assert found is not None
        assert (found["activation"], found["gated"], found["limit"]) == (activation, gated, 0.0)


def test_quick_gelu_is_silu_with_another_slope() -> None:
    found = classify_gate(_halves(ACT2FN["quick_gelu"]), gated=True, numbers=())
    assert found is not None
    assert (found["activation"], found["alpha"]) == ("silu", 1.702)


def test_a_gate_in_float32_is_the_same() -> None:
    found = classify_gate(
        lambda h: (functional.silu(h[..., :4].float()) * h[..., 4:].float()).to(h.dtype), gated=True, numbers=()
    )
    assert found is not None
    assert found["activation"] == "silu"


def test_what_the_op_does_not_cover_is_none_of_its_kinds() -> None:
    def after(hidden: Tensor) -> Tensor:
        one, other = hidden.chunk(2, -1)
        return functional.silu(one).clamp(max=3.0) * other

    def swapped(hidden: Tensor) -> Tensor:
        one, other = hidden.chunk(2, -1)
        return one * functional.silu(other)

    def failing(hidden: Tensor) -> Tensor:
        return hidden @ torch.zeros(1, 1)

    for function in (after, swapped, failing, _halves(ACT2FN["mish"]), _halves(nn.PReLU())):
        assert classify_gate(function, gated=True, numbers=(3.0,)) is None


def test_a_large_limit_is_not_overlooked() -> None:
    def limited(hidden: Tensor) -> Tensor:
        one, other = hidden.chunk(2, -1)
        return functional.silu(one.clamp(max=5000.0)) * other.clamp(-5000.0, 5000.0)

    found = classify_gate(limited, gated=True, numbers=(5000.0,))
    assert found is not None
    assert found["limit"] == 5000.0


def test_experts_that_the_op_does_not_cover_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mixture("mixtral")
    for layer in model.model.layers:
        monkeypatch.setattr(layer.mlp.experts, "act_fn", nn.Mish())
    inputs = batch(2, 5)
    program = capture(model)
    assert _calls(program) == []
    with torch.no_grad():
        expected = model(**inputs._asdict(), use_cache=False).logits
    assert distance(program(*inputs)[0], expected, inputs.attention_mask) < 1e-5


def test_the_callers_model_keeps_its_own_experts() -> None:
    _captured("mixtral")
    assert tiny_mixture("mixtral").config._experts_implementation == "eager"
