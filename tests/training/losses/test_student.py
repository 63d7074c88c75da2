"""The loss of a program in training, against the models themselves."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from skink.errors import GraphError, OptionError
from skink.graph.calibration import token_batches
from skink.training.losses.objectives import Terms
from skink.training.losses.student import Student
from tests.models import FAMILIES
from tests.programs import batch, canonical, eager
from tests.training.losses.examples import EVERY, gradients, inputs, perturbed
from tests.training.students import factored


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(family: str) -> None:
    """Against transformers' own forward, with plain attention, and PyTorch's cross-entropy."""
    program, model = canonical(family), copy.deepcopy(eager(family))
    found, made = gradients(Student(program, None, Terms(ce=1.0)), inputs(program))
    given = batch(2, 8, 3)
    logits = model(**given._asdict()).logits[:, :-1]
    counted = (given.attention_mask[:, 1:] * given.attention_mask[:, :-1]).bool()
    wanted = nn.functional.cross_entropy(logits[counted], given.input_ids[:, 1:][counted], reduction="sum")
    wanted.backward()
    assert int(found["tokens"]) == int(counted.sum())
    torch.testing.assert_close(found["loss"].detach(), wanted.detach(), rtol=1e-5, atol=1e-4)
    own = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    if family == "gpt2":
        # Its layers keep their weights the other way round.
        own = {name: value.T if ".h." in name and value.dim() == 2 else value for name, value in own.items()}
    shared = [name for name in own if name in made and made[name] is not None and made[name].shape == own[name].shape]
    assert len(shared) > 10
    for name in shared:
        size = float(own[name].abs().max())
        torch.testing.assert_close(made[name], own[name], rtol=1e-3, atol=1e-4 * max(size, 1e-2), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_nothing(family: str) -> None:
    original, program = canonical(family), perturbed(family)
    results = [
        gradients(Student(program, original, EVERY, checkpointing=checkpointing), inputs(program))
        for checkpointing in (False, True)
    ]
    (one, before), (two, after) = results
    assert {name: float(value.detach()) for name, value in one.items()} == {
        name: float(value.detach()) for name, value in two.items()
    }
    assert all(float(one[name].detach()) > 0 for name in EVERY.weights())
    assert all(torch.equal(before[name], after[name]) for name in before if before[name] is not None)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_is_the_weighted_sum_of_terms_computed_apart(checkpointing: bool) -> None:
    program, original = factored()
    given = inputs(program)
    found = Student(program, original, EVERY, checkpointing=checkpointing)(**given)
    alone = {
        name: Student(program, original, Terms(**{name: 1.0}, temperature=2.0))(**given)[name]
        for name in EVERY.weights()
    }
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value)
        assert not found[name].requires_grad
        assert found[name].dtype is torch.float32
    total = sum(weight * alone[name] for name, weight in EVERY.weights().items())
    torch.testing.assert_close(found["loss"].detach(), total)
    assert list(found) == ["loss", *EVERY.on_logits, "tokens", *EVERY.by_layer]
    assert found["tokens"].dtype is torch.int64


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_student_like_its_teacher_has_nothing_to_learn(family: str, precision: Any) -> None:
    program = canonical(family).with_dtype(torch.float16)
    terms = Terms(kl=1.0, reverse_kl=1.0, hidden=1.0, attention=1.0)
    found, made = gradients(Student(program, program.clone(), terms, precision=precision), inputs(program))
    assert all(float(found[name].detach()) == 0.0 for name in ("loss", *terms.weights()))
    assert all(not gradient.any() for gradient in made.values() if gradient is not None)


def test_hidden_errors_are_the_models_own() -> None:
    """Against hidden states that transformers gives, window by window."""
    program, original = perturbed("llama"), canonical("llama")
    given = batch(2, 8, 3)
    found = Student(program, original, Terms(hidden=1.0), patterns=("*.layers.0",))(**given._asdict())["hidden"]
    model = copy.deepcopy(eager("llama"))
    model.load_state_dict(
        {name: program.weight(name) for name in model.state_dict() if "lm_head" not in name}, strict=False
    )
    with torch.no_grad():
        one, two = (
            entry(**given._asdict(), output_hidden_states=True).hidden_states[1].double()
            for entry in (model, eager("llama"))
        )
    counted = torch.zeros(2, 8, dtype=torch.bool)
    counted[:, :-1] = (given.attention_mask[:, 1:] * given.attention_mask[:, :-1]).bool()
    wanted = 0.0
    for row in range(2):
        error, size = ((entry[row][counted[row]] ** 2).mean() for entry in (one - two, two))
        wanted += float(error / size) * int(counted[row].sum())
    torch.testing.assert_close(float(found), wanted, rtol=1e-4, atol=1e-5)


def test_sums_do_not_depend_on_how_windows_are_put_into_batches() -> None:
    program, original = factored()
    module = Student(program, original, EVERY)
    given = inputs(program, size=4, padding=4)
    with torch.no_grad():
        whole = module(**given)
        parts = [module(**{name: value[row : row + 1] for name, value in given.items()}) for row in range(4)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side: str) -> None:
    program, original = factored()
    module = Student(program, original, EVERY)
    windows = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(5))
    extra, ones = torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(windows)
    parts = [(extra, extra), (windows, ones)] if side == "left" else [(windows, ones), (extra, extra)]
    tokens, mask = (torch.cat([part[index] for part in parts], 1) for index in (0, 1))
    (plain,) = token_batches(program, windows)
    (padded,) = token_batches(program, tokens, padding=mask)
    with torch.no_grad():
        one, two = module(**plain), module(**padded)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-4)


def test_text_of_padding_alone_gives_zeros() -> None:
    program, original = factored()
    given = inputs(program, padding=0)
    given["attention_mask"] = torch.zeros_like(given["attention_mask"])
    found, made = gradients(Student(program, original, EVERY), given)
    assert all(float(value.detach()) == 0.0 for value in found.values())
    assert all(not gradient.any() for gradient in made.values() if gradient is not None)


def test_what_is_drawn_is_drawn_alike_and_no_switch_is_left_on() -> None:
    program, original = factored()
    state = (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_rng_state(),
    )
    results = [gradients(Student(program, original, EVERY, precision="bfloat16"), inputs(program)) for _ in range(2)]
    (one, before), (two, after) = results
    assert torch.equal(one["loss"], two["loss"])
    assert all(torch.equal(before[name], after[name]) for name in before if before[name] is not None)
    assert torch.equal(state[3], torch.get_rng_state())
    assert state[:3] == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(OptionError, match=r"\[OPTION-002\] precision='bf16' is unknown(.|\n)*bfloat16"):
        Student(canonical("llama"), None, Terms(ce=1.0), precision="bf16")


@pytest.mark.parametrize(
    ("change", "message"), [(None, "'position_ids' is missing"), ("labels", "'labels' is unknown")]
)
def test_inputs_of_another_model_are_refused(change: str | None, message: str) -> None:
    program = canonical("llama")
    given = inputs(program)
    if change is None:
        del given["position_ids"]
    else:
        given[change] = given["input_ids"]
    with pytest.raises(GraphError, match=rf"\[GRAPH-003\] .*{message}"):
        Student(program, None, Terms(ce=1.0))(**given)


def test_losses_are_in_nats() -> None:
    program = canonical("llama")
    for name, tensor in list(program.weights()):
        if name == "lm_head.weight":
            program.set_weight(name, torch.zeros_like(tensor))
    found = Student(program, None, Terms(ce=2.0))(**inputs(program))
    torch.testing.assert_close(float(found["ce"]), int(found["tokens"]) * math.log(97), rtol=1e-6, atol=0)
    torch.testing.assert_close(float(found["loss"].detach()), 2 * float(found["ce"]), rtol=1e-6, atol=0)
