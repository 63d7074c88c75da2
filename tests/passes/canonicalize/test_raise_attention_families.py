"""Families that write attention, masks and rotary by hand: raised, equal to transformers on padding, and stepped."""

import collections
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from skink.graph.capture import capture
from skink.graph.pattern import op_name
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.graph.state import derive_step
from skink.kernels import ATTENTION
from skink.passes.canonicalize import Canonicalize
from tests.graph.stepping import empty_state
from tests.models import VOCABULARY
from tests.programs import batch, distance

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_FALCON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_GPTJ = {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
_NEO = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 48, "window_size": 5}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": ("falcon", _FALCON),
    "falcon-many-keys": ("falcon", _FALCON | {"multi_query": False, "bias": True}),
    "falcon-new": ("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("falcon", _FALCON | {"alibi": True}),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "gptj": ("gptj", _GPTJ),
    "codegen": ("codegen", _GPTJ),
    "gpt_neo": ("gpt_neo", _NEO | {"attention_types": [[["global", "local"], 1]]}),
}
# What each call of attention has besides the padding mask: causal, scale 1/4.
OPTIONS = {
    "falcon-alibi": [{"alibi"}] * 2,
    "bloom": [{"alibi"}] * 2,
    "mpt": [{"alibi"}] * 2,
    "gpt_neo": [set(), {"window"}],
}
ROTARY = {"falcon": 4, "falcon-many-keys": 4, "falcon-new": 4, "gptj": 4, "codegen": 4}


@cache
def model_of(variant: str) -> PreTrainedModel:
    family, options = VARIANTS[variant]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_TOKENS, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.config._attn_implementation = "eager"
    return model.eval()


@cache
def program_of(variant: str) -> Program:
    program = capture(model_of(variant))
    # GPT-Neo's padding rows see their own tokens, in part: nothing reads them, and level 2 does.
    Pipeline((Canonicalize(),)).run(program, verify=1)
    return program


def given(program: Program, inputs: Any) -> list[Tensor]:
    return [getattr(inputs, entry.name) for entry in program.inputs]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_all_attention_is_raised(variant: str) -> None:
    program = program_of(variant)
    found = collections.Counter(op_name(node) for node in program.graph.nodes)
    assert found["skink.attention"] == 2
    assert found["skink.rotary"] == ROTARY.get(variant, 0)
    assert not {"softmax", "matmul", "bmm", "baddbmm", "arange", "cumsum", "stack"} & set(found)
    calls = [node for node in program.graph.nodes if node.target is ATTENTION.overload]
    for node, wanted in zip(calls, OPTIONS.get(variant, [set()] * 2), strict=True):
        arguments = ATTENTION.bind(node.args, node.kwargs)
        assert {name for name in ("alibi", "window", "softcap", "sinks") if arguments[name]} == wanted
        assert arguments["causal"] is True
        assert arguments["scale"] == (1.0 if variant == "gpt_neo" else 0.25)
        assert arguments["key_mask"].args[0].target == "attention_mask"


def test_logits_stay(variant: str) -> None:
    inputs, model, program = batch(3, 11, padding=4), model_of(variant), program_of(variant)
    names = [entry.name for entry in program.inputs]
    with torch.no_grad():
        wanted = model(**{name: value for name, value in inputs._asdict().items() if name in names}).logits
    assert distance(program(*given(program, inputs))[0], wanted, inputs.attention_mask) < 1e-5


def test_greedy_tokens_are_those_of_transformers(variant: str) -> None:
    prompt, model, program = batch(2, 5, padding=2), model_of(variant), derive_step(program_of(variant))
    wanted = model.generate(
        prompt.input_ids, attention_mask=prompt.attention_mask, max_new_tokens=9, min_new_tokens=9, do_sample=False
    )
    values, state = prompt._asdict(), empty_state(program, 2)
    found = [prompt.input_ids]
    for _ in range(9):
        logits, *state = program(*[values[entry.name] for entry in program.inputs], *state)
        # transformers keeps from the end while it is told to go on.
        tokens = logits[:, -1:].index_fill(-1, torch.tensor(2), -torch.inf).argmax(-1)
        found.append(tokens)
        ones = torch.ones_like(tokens)
        values = {
            "input_ids": tokens,
            "attention_mask": torch.cat((values["attention_mask"], ones), 1),
            "position_ids": values["position_ids"][:, -1:] + 1,
        }
    assert torch.equal(torch.cat(found, 1), wanted)


def test_a_second_time_changes_nothing(variant: str) -> None:
    program = program_of(variant).clone()
    result = Pipeline((Canonicalize(),)).run(program, verify=1)
    assert result.passes[0].result.edits == 0
    assert str(program) == str(program_of(variant))


def test_keys_are_kept_once_for_the_queries_that_share_them() -> None:
    for name, heads in (("falcon", 1), ("falcon-many-keys", 4), ("falcon-alibi", 1), ("falcon-new", 2)):
        stepped = derive_step(program_of(name))
        assert {entry.shape[1] for entry in stepped.state} == {heads}, name


class Block(nn.Module):
    """nanoGPT's attention: the mask is a buffer, cut to the length."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.register_buffer("bias", torch.tril(torch.ones(40, 40)).view(1, 1, 40, 40))

    def forward(self, x: Tensor) -> Tensor:
        size, length, width = x.size()
        q, k, v = (part.view(size, length, 4, 8).transpose(1, 2) for part in self.qkv(x).split(width, dim=2))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        y = nn.functional.dropout(scores.softmax(-1), 0.1, self.training) @ v
        return self.out(y.transpose(1, 2).contiguous().view(size, length, width))


class Nano(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(x)
        return logits


def test_nanogpt() -> None:
    model = Nano().eval()
    program = capture(model, (torch.zeros(2, 5, dtype=torch.int64),))
    Pipeline((Canonicalize(),)).run(program, verify=2)
    found = collections.Counter(op_name(node) for node in program.graph.nodes)
    assert (found["skink.attention"], found["softmax"], found["linear"]) == (2, 0, 5)
    assert not [name for name in program.stored_weights() if name.endswith(".bias") and name.count(".") == 2]
    tokens = torch.randint(0, VOCABULARY, (2, 9))
    stepped = derive_step(program)
    with torch.no_grad():
        wanted = model(tokens)
    state, parts = empty_state(stepped, 2), []
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        part, *state = stepped(tokens[:, begin:end], *state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["codegen", "falcon-alibi", "gpt_neo"])
def test_other_dtypes_of_weights(name: str, dtype: torch.dtype) -> None:
    program, inputs = program_of(name), batch(2, 7, padding=2)
    wide = program(*given(program, inputs))[0]
    # CodeGen turns queries and keys by tables in float32; the op takes them as wide as its values.
    found = program.with_dtype(dtype)(*given(program, inputs))[0]
    assert found.dtype is dtype
    allowed = 1e-5 if dtype is torch.float64 else 0.02
    assert distance(found.to(wide.dtype), wide, inputs.attention_mask) < allowed * float(wide.abs().max())
