"""What a program in training learns from."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import skink
from skink.errors import RecoveryError
from skink.graph.calibration import token_batches
from skink.graph.program import Program
from skink.graph.windows import Windows
from skink.training.loop.options import TrainOptions
from skink.training.loop.trainer import train
from skink.training.losses.objectives import Terms
from skink.training.losses.segments import Segments
from skink.training.losses.student import Student
from tests.models import build
from tests.programs import canonical
from tests.training.losses.examples import EVERY, encoder, inputs, perturbed
from tests.training.students import factored


def test_the_teacher_is_no_part_of_the_module() -> None:
    program, original = factored()
    with_teacher, without = Student(program, original, EVERY), Student(program, None, Terms(ce=1.0))
    for listed in ("named_parameters", "named_buffers", "named_modules"):
        one, two = ([name for name, _ in getattr(module, listed)()] for module in (with_teacher, without))
        assert one == two
    assert all(name.startswith("model.") for name in with_teacher.state_dict())


def test_the_teacher_shares_its_weights_and_moves_along(monkeypatch: pytest.MonkeyPatch) -> None:
    program, original = factored()
    module = Student(program, original, Terms(kl=1.0))
    read: dict[str, Tensor] = {}
    teacher = module._teacher
    tensor_of = teacher.tensor
    monkeypatch.setattr(teacher, "tensor", lambda name: read.setdefault(name, tensor_of(name)))
    module(**inputs(program))
    assert len(read) > 10
    for name, tensor in read.items():
        assert tensor.data_ptr() == original.weight(name).data_ptr()
    # A dtype is for the student's parameters; a device is for both.
    module.to(torch.float64)
    assert tensor_of("model.embed_tokens.weight").data_ptr() == original.weight("model.embed_tokens.weight").data_ptr()
    asked: set[torch.device] = set()
    monkeypatch.setattr(teacher, "move", lambda device: asked.update(device(tensor) for tensor in read.values()))
    module.to("meta")
    assert asked == {torch.device("meta")}


def test_the_teacher_does_not_run_where_no_term_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    program, original = factored()
    runs: list[int] = []
    run = Segments.run

    def counting(self: Segments, *args: Any) -> list[Any]:
        runs.append(len(self.weights))
        return run(self, *args)

    monkeypatch.setattr(Segments, "run", counting)
    Student(program, original, Terms(ce=1.0))(**inputs(program))
    assert len(runs) == 1
    runs.clear()
    Student(program, original, Terms(hidden=1.0), patterns=("*.layers.0",))(**inputs(program))
    # Both stop behind the first layer.
    assert len(runs) == 2
    assert max(runs) < len(list(program.weights())) * 0.6


def test_no_gradient_reaches_the_teacher() -> None:
    program = canonical("llama")
    module = Student(perturbed("llama"), program, EVERY)
    for _, tensor in program.weights():
        tensor.requires_grad_(tensor.is_floating_point())
    module(**inputs(program))["loss"].backward()
    assert all(tensor.grad is None for _, tensor in program.weights())


def vocabulary_of_64() -> Program:
    return skink.capture(build("llama", vocab_size=64))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda: None, "there is none"),
        (vocabulary_of_64, "it has 64 tokens in its table, and the student 97"),
        (encoder, "it takes token_type_ids, and the student takes input_ids, attention_mask, position_ids"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(teacher: Callable[[], Program | None], message: str) -> None:
    with pytest.raises(RecoveryError, match=rf"\[RECOVER-006\].*\n.*{message}"):
        Student(canonical("llama"), teacher(), Terms(kl=1.0))


def test_places_that_no_student_has_are_refused() -> None:
    with pytest.raises(RecoveryError, match=r"\[RECOVER-007\]"):
        Student(canonical("llama"), canonical("gpt2"), Terms(hidden=1.0))


def test_a_teacher_that_is_not_finite_is_found() -> None:
    program, original = factored()
    given = inputs(program)
    assert Student(program, original, EVERY).teacher_fault(given) == ""
    assert Student(program, None, Terms(ce=1.0)).teacher_fault(given) == ""
    name = "model.layers.1.mlp.down_proj.weight"
    original.set_weight(name, torch.full_like(original.weight(name), torch.inf))
    damaged = f"the teacher's weight {name!r} was not finite before the first step."
    assert Student(program, original, EVERY).teacher_fault(given) == damaged
    # Nothing that is compared depends on it.
    assert Student(program, original, Terms(hidden=1.0), patterns=("*.layers.0",)).teacher_fault(given) == ""
    original.set_weight(name, torch.full_like(original.weight(name), 3e38))
    overflows = "the teacher gives values that are not finite for this text."
    assert Student(program, original, EVERY).teacher_fault(given) == overflows


def test_training_says_that_the_teacher_is_not_finite() -> None:
    program, original = factored()
    name = "model.norm.weight"
    original.set_weight(name, torch.full_like(original.weight(name), torch.nan))
    student = Student(program, original, Terms(ce=1.0, kl=1.0))
    text = Windows(torch.randint(3, 97, (4, 6)))
    with pytest.raises(RecoveryError, match="training cannot begin: its term 'kl' is nan") as caught:
        train(student, text, TrainOptions(batch=2), make_inputs=lambda tokens, _: token_batches(program, tokens)[0])
    assert caught.value.why == f"the teacher's weight {name!r} was not finite before the first step."
    # Likewise the student's own, by the name that it has in the program.
    program.set_weight(name, original.weight(name))
    with pytest.raises(RecoveryError, match=f"the weight {name!r} was not finite"):
        train(
            Student(program, None, Terms(ce=1.0)),
            text,
            TrainOptions(batch=2),
            make_inputs=lambda tokens, _: token_batches(program, tokens)[0],
        )
