"""What trains, and whose tensors these are."""

import copy
from typing import Any

import pytest
import torch

from skink.training.losses.objectives import Terms
from skink.training.losses.student import Student
from skink.training.weights.trainable import choose_trainable
from tests.programs import canonical
from tests.training.losses.examples import EVERY, gradients, inputs
from tests.training.students import factored


def test_a_copy_trains_by_itself() -> None:
    program, original = factored()
    module = Student(program, original, EVERY)
    other, given = copy.deepcopy(module), inputs(program)
    before = float(module(**given)["loss"].detach())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert float(module(**given)["loss"].detach()) == before
    assert float(other(**given)["loss"].detach()) != before


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_leaves_the_programs_alone(stored: torch.dtype, precision: Any) -> None:
    original = canonical("llama").with_dtype(stored)
    program = original.clone()
    kept = {name: tensor.clone() for name, tensor in program.weights()}
    module = Student(program, original, EVERY, precision=precision)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module(**inputs(program))["loss"].backward()
    optimizer.step()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in program.weights())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in original.weights())


def test_tensors_are_shared_where_asked_for() -> None:
    program = canonical("llama")
    one, two = (Student(program, None, Terms(ce=1.0), copy=copied) for copied in (True, False))
    name = "model.layers.0.mlp.up_proj.weight"
    assert one.model.get_parameter(name).data_ptr() != program.weight(name).data_ptr()
    assert two.model.get_parameter(name).data_ptr() == program.weight(name).data_ptr()
    # What trains gets a tensor of its own.
    choose_trainable(two.model, program, None, "*.mlp.*")
    assert two.model.get_parameter(name).data_ptr() != program.weight(name).data_ptr()


@pytest.mark.parametrize(
    ("precision", "held"), [("float32", torch.float32), ("bfloat16", torch.float16), ("float16", torch.float16)]
)
def test_frozen_weights_keep_their_dtype_under_autocast(precision: Any, held: torch.dtype) -> None:
    program = canonical("llama").with_dtype(torch.float16)
    module = Student(program, canonical("llama"), EVERY, precision=precision)
    names = choose_trainable(module.model, program, None, "*.mlp.*")
    for name, parameter in module.model.named_parameters():
        assert parameter.dtype is (torch.float32 if name in names else held)
    found, made = gradients(module, inputs(program))
    assert bool(found["loss"].isfinite())
    assert {name for name, gradient in made.items() if gradient is not None} == set(names)
    wanted = Student(program.with_dtype(torch.float32), canonical("llama"), EVERY)(**inputs(program))
    torch.testing.assert_close(found["ce"], wanted["ce"], rtol=2e-3, atol=1e-2)


def test_tied_weights_stay_one() -> None:
    program = canonical("gemma2").with_dtype(torch.float16)
    module = Student(program, None, Terms(ce=1.0))
    head, table = (module.model.get_submodule(name) for name in ("lm_head", "model.embed_tokens"))
    assert head.weight is table.weight
    _, made = gradients(module, inputs(program))
    assert bool(made["lm_head.weight" if "lm_head.weight" in made else "model.embed_tokens.weight"].any())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_of_peft_are_what_trains(checkpointing: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    program, original = factored()
    module = Student(program, original, Terms(kl=1.0), checkpointing=checkpointing)
    given = inputs(program)
    before = float(module(**given)["loss"].detach())
    names = ["q_proj.up", "up_proj.down"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=names, init_lora_weights=False), module.model)
    found = module(**given)
    assert abs(float(found["loss"].detach()) - before) > 1e-3
    found["loss"].backward()
    touched = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert touched
    assert all("lora_" in name for name in touched)
    # Messages name weights as the program does.
    assert {name for name, _ in program.weights()} - program.buffers <= {name for name, _ in module.own_weights()}
    assert len(touched) == 8


def test_weights_that_the_loss_does_not_reach_are_listed() -> None:
    program, original = factored()
    assert not Student(program, original, EVERY).idle
    assert Student(program, original, Terms(hidden=1.0)).idle == {"model.norm.weight", "lm_head.weight"}
    module = Student(program, original, Terms(hidden=1.0), patterns=("*.layers.0",))
    _, made = gradients(module, inputs(program))
    assert module.idle == {name for name, gradient in made.items() if gradient is None}
