"""Kernels bound to ops: which, why, and the same numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skink.graph.program import Stage
from skink.graph.state import derive_step
from skink.kernels import find_op
from skink.kernels.cpp.library import library
from skink.kernels.pivoted_linear.columns import index_select
from skink.passes.lower import Choice, lower
from tests.graph.stepping import empty_state, step_through
from tests.programs import batch, canonical, canonicalized, distance


def kernels(choices: tuple[Choice, ...]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for choice in choices:
        found.setdefault(choice.op, set()).add(choice.kernel)
    return found


def test_every_op_is_bound_and_the_program_is_left_alone() -> None:
    program = canonical("llama")
    text = str(program)
    lowered, choices = lower(program)
    assert lowered.stage is Stage.LOWERED
    assert (program.stage, str(program)) == (Stage.CANONICAL, text)
    assert len(choices) == 5 + 4 + 2
    bound = [node for node in lowered.graph.nodes if find_op(node.target) is not None]
    assert len(bound) == sum(choice.kernel == "reference" for choice in choices)
    assert lowered.inputs == program.inputs
    assert lowered.outputs == program.outputs


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_stay_within_rounding(name: str, dtype: torch.dtype) -> None:
    program = canonical(name)
    for weight_name, weight in list(program.weights()):
        if weight_name not in program.buffers:
            program.set_weight(weight_name, weight.to(dtype))
    lowered, _ = lower(program)
    inputs = batch(2, 19, padding=4)
    found, wanted = lowered(*inputs)[0], program(*inputs)[0]
    assert found.dtype is wanted.dtype is dtype
    allowed = 1e-5 if dtype is torch.float32 else 0.05 * float(wanted.abs().max())
    assert distance(found.float(), wanted.float(), inputs.attention_mask) < allowed


def test_stepped_programs_are_lowered_too() -> None:
    program = canonical("gemma2")
    stepped, _ = lower(derive_step(program))
    inputs = batch(2, 20, padding=3)
    found, _ = step_through(stepped, inputs, [18, 1, 1], empty_state(stepped, 2))
    assert distance(found, program(*inputs)[0], inputs.attention_mask) < 1e-5


def test_training_binds_only_kernels_that_gradients_flow_through() -> None:
    program = canonical("llama")
    lowered, choices = lower(program, training=True)
    assert kernels(choices) == {"rms_norm": {"reference"}, "rotary": {"reference"}, "attention": {"torch"}}
    assert all(dict(choice.refused)["cpp"] == "has no gradient" for choice in choices)
    inputs = batch(2, 5)
    gradients = []
    for subject in (lowered, program):
        module = subject.module()
        module(*inputs).pow(2).mean().backward()
        gradients.append(module.get_parameter("model.layers.0.self_attn.k_proj.weight").grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_without_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skink.kernels.opdef.library", lambda: type(library())(available=False, reason="not built"))
    _, choices = lower(canonical("gemma2"))
    assert kernels(choices) == {"rms_norm": {"reference"}, "rotary": {"reference"}, "attention": {"reference"}}
    attention = next(choice for choice in choices if choice.op == "attention")
    assert attention.refused == (("cpp", "not built"), ("torch", "has no soft cap"))
    assert attention.node.startswith("%attention, model.layers.0.self_attn (")


def test_with_the_compiled_kernels() -> None:
    if not library().available:
        pytest.skip(library().reason)
    lowered, choices = lower(canonical("llama"))
    assert kernels(choices) == {"rms_norm": {"cpp"}, "rotary": {"cpp"}, "attention": {"cpp"}}
    assert all(choice.refused == () for choice in choices)
    assert "skink_cpp.rms_norm(" in str(lowered)


def test_kernels_know_the_dtype_and_device_to_come() -> None:
    if not library().available:
        pytest.skip(library().reason)
    _, choices = lower(canonical("llama"), dtype=torch.float64)
    assert kernels(choices) == {"rms_norm": {"reference"}, "rotary": {"reference"}, "attention": {"torch"}}
    assert choices[0].refused == (("cpp", "reads float32, bfloat16 and float16, not float64"),)
    _, choices = lower(canonical("llama"), device="cuda")
    assert choices[0].refused == (("cpp", "runs on cpu, not on cuda"),)


def test_weights_replaced_since_capture_are_noticed() -> None:
    program = canonical("llama")
    for name, weight in list(program.weights()):
        program.set_weight(name, weight.double(), buffer=name in program.buffers)
    lowered, choices = lower(program)
    assert not [choice for choice in choices if choice.kernel == "cpp"]
    inputs = batch(1, 3)
    assert lowered(*inputs)[0].dtype is torch.float64


def test_the_environment_can_ask_for_references(set_environment: Any) -> None:
    set_environment(SKINK_KERNELS="reference")
    _, choices = lower(canonical("llama"))
    assert {choice.kernel for choice in choices} == {"reference"}
    assert {choice.refused for choice in choices} == {(("all", "SKINK_KERNELS=reference"),)}


def test_lowering_twice_changes_nothing() -> None:
    lowered, choices = lower(canonical("llama"))
    again, rest = lower(lowered)
    assert str(again) == str(lowered)
    assert len(rest) == sum(choice.kernel == "reference" for choice in choices)


def test_columns_are_picked_by_the_quicker_function() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("order", torch.tensor([2, 0, 2]))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x.index_select(-1, self.order), x.index_select(1, self.order)

    x = torch.randn(2, 5, 4)
    program, _ = canonicalized(Picks(), x)
    lowered, _ = lower(program)
    assert len(lowered.graph.find_nodes(op="call_function", target=index_select)) == 2
    for got, expected in zip(lowered(x), program(x), strict=True):
        assert torch.equal(got, expected)
