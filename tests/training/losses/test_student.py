"""The loss of a program in training, against the models themselves."""

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

import skink
from skink.errors import GraphError, OptionError, RecoveryError
from skink.graph.calibration import token_batches
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.passes.canonicalize import Canonicalize
from skink.training.losses.objectives import Terms
from skink.training.losses.segments import Segments
from skink.training.losses.student import Student, main_input
from skink.training.weights.trainable import choose_trainable
from tests.models import FAMILIES, build
from tests.programs import batch, canonical, eager
from tests.training.students import factored

EVERY = Terms(ce=1.0, kl=0.5, reverse_kl=0.25, js=2.0, hidden=3.0, attention=1.5, temperature=2.0)


def inputs(program: Program, *, size: int = 2, length: int = 8, padding: int = 3) -> dict[str, Tensor]:
    given = batch(size, length, padding)._asdict()
    return {entry.name: given[entry.name] for entry in program.inputs}


def student(program: Program, original: Program | None, terms: Terms, **options: Any) -> Student:
    return Student(program, original, terms, **options)


def gradients(module: Student, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    found = module(**given)
    found["loss"].backward()
    return found, {name: parameter.grad for name, parameter in module.model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(family: str) -> None:
    """Against transformers' own forward, with plain attention, and PyTorch's cross-entropy."""
    program, model = canonical(family), copy.deepcopy(eager(family))
    found, made = gradients(student(program, None, Terms(ce=1.0)), inputs(program))
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
        gradients(student(program, original, EVERY, checkpointing=checkpointing), inputs(program))
        for checkpointing in (False, True)
    ]
    (one, before), (two, after) = results
    assert {name: float(value.detach()) for name, value in one.items()} == {
        name: float(value.detach()) for name, value in two.items()
    }
    assert all(float(one[name].detach()) > 0 for name in EVERY.weights())
    assert all(torch.equal(before[name], after[name]) for name in before if before[name] is not None)


@cache
def perturbed(family: str) -> Program:
    program = canonical(family)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in list(program.weights()):
        if name not in program.buffers:
            noise = torch.randn(tensor.shape, generator=generator)
            program.set_weight(name, tensor + 0.02 * noise)
    return program


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_is_the_weighted_sum_of_terms_computed_apart(checkpointing: bool) -> None:
    program, original = factored()
    given = inputs(program)
    found = student(program, original, EVERY, checkpointing=checkpointing)(**given)
    alone = {
        name: student(program, original, Terms(**{name: 1.0}, temperature=2.0))(**given)[name]
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
    found, made = gradients(student(program, program.clone(), terms, precision=precision), inputs(program))
    assert all(float(found[name].detach()) == 0.0 for name in ("loss", *terms.weights()))
    assert all(not gradient.any() for gradient in made.values() if gradient is not None)


def test_hidden_errors_are_the_models_own() -> None:
    """Against hidden states that transformers gives, window by window."""
    program, original = perturbed("llama"), canonical("llama")
    given = batch(2, 8, 3)
    found = student(program, original, Terms(hidden=1.0), patterns=("*.layers.0",))(**given._asdict())["hidden"]
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
    module = student(program, original, EVERY)
    given = inputs(program, size=4, padding=4)
    with torch.no_grad():
        whole = module(**given)
        parts = [module(**{name: value[row : row + 1] for name, value in given.items()}) for row in range(4)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side: str) -> None:
    program, original = factored()
    module = student(program, original, EVERY)
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
    found, made = gradients(student(program, original, EVERY), given)
    assert all(float(value.detach()) == 0.0 for value in found.values())
    assert all(not gradient.any() for gradient in made.values() if gradient is not None)


def test_the_teacher_is_no_part_of_the_module() -> None:
    program, original = factored()
    with_teacher, without = student(program, original, EVERY), student(program, None, Terms(ce=1.0))
    for listed in ("named_parameters", "named_buffers", "named_modules"):
        one, two = ([name for name, _ in getattr(module, listed)()] for module in (with_teacher, without))
        assert one == two
    assert all(name.startswith("model.") for name in with_teacher.state_dict())


def test_the_teacher_shares_its_weights_and_moves_along(monkeypatch: pytest.MonkeyPatch) -> None:
    program, original = factored()
    module = student(program, original, Terms(kl=1.0))
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
    student(program, original, Terms(ce=1.0))(**inputs(program))
    assert len(runs) == 1
    runs.clear()
    student(program, original, Terms(hidden=1.0), patterns=("*.layers.0",))(**inputs(program))
    # Both stop behind the first layer.
    assert len(runs) == 2
    assert max(runs) < len(list(program.weights())) * 0.6


def test_a_copy_trains_by_itself() -> None:
    program, original = factored()
    module = student(program, original, EVERY)
    other, given = copy.deepcopy(module), inputs(program)
    before = float(module(**given)["loss"].detach())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert float(module(**given)["loss"].detach()) == before
    assert float(other(**given)["loss"].detach()) != before


def test_no_gradient_reaches_the_teacher() -> None:
    program = canonical("llama")
    module = student(perturbed("llama"), program, EVERY)
    for _, tensor in program.weights():
        tensor.requires_grad_(tensor.is_floating_point())
    module(**inputs(program))["loss"].backward()
    assert all(tensor.grad is None for _, tensor in program.weights())


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_leaves_the_programs_alone(stored: torch.dtype, precision: Any) -> None:
    original = canonical("llama").with_dtype(stored)
    program = original.clone()
    kept = {name: tensor.clone() for name, tensor in program.weights()}
    module = student(program, original, EVERY, precision=precision)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module(**inputs(program))["loss"].backward()
    optimizer.step()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in program.weights())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in original.weights())


def test_tensors_are_shared_where_asked_for() -> None:
    program = canonical("llama")
    one, two = (student(program, None, Terms(ce=1.0), copy=copied) for copied in (True, False))
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
    module = student(program, canonical("llama"), EVERY, precision=precision)
    names = choose_trainable(module.model, program, None, "*.mlp.*")
    for name, parameter in module.model.named_parameters():
        assert parameter.dtype is (torch.float32 if name in names else held)
    found, made = gradients(module, inputs(program))
    assert bool(found["loss"].isfinite())
    assert {name for name, gradient in made.items() if gradient is not None} == set(names)
    wanted = student(program.with_dtype(torch.float32), canonical("llama"), EVERY)(**inputs(program))
    torch.testing.assert_close(found["ce"], wanted["ce"], rtol=2e-3, atol=1e-2)


def test_tied_weights_stay_one() -> None:
    program = canonical("gemma2").with_dtype(torch.float16)
    module = student(program, None, Terms(ce=1.0))
    head, table = (module.model.get_submodule(name) for name in ("lm_head", "model.embed_tokens"))
    assert head.weight is table.weight
    _, made = gradients(module, inputs(program))
    assert bool(made["lm_head.weight" if "lm_head.weight" in made else "model.embed_tokens.weight"].any())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_of_peft_are_what_trains(checkpointing: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    program, original = factored()
    module = student(program, original, Terms(kl=1.0), checkpointing=checkpointing)
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
    assert len(touched) == 8


def test_what_is_drawn_is_drawn_alike_and_no_switch_is_left_on() -> None:
    program, original = factored()
    state = (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_rng_state(),
    )
    results = [gradients(student(program, original, EVERY, precision="bfloat16"), inputs(program)) for _ in range(2)]
    (one, before), (two, after) = results
    assert torch.equal(one["loss"], two["loss"])
    assert all(torch.equal(before[name], after[name]) for name in before if before[name] is not None)
    assert torch.equal(state[3], torch.get_rng_state())
    assert state[:3] == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))


def test_weights_that_the_loss_does_not_reach_are_listed() -> None:
    program, original = factored()
    assert not student(program, original, EVERY).idle
    assert student(program, original, Terms(hidden=1.0)).idle == {"model.norm.weight", "lm_head.weight"}
    module = student(program, original, Terms(hidden=1.0), patterns=("*.layers.0",))
    _, made = gradients(module, inputs(program))
    assert module.idle == {name for name, gradient in made.items() if gradient is None}


@cache
def encoder(kind: str = "bert") -> Program:
    small = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModel if kind == "bert" else AutoModelForMaskedLM
        model = made.from_config(AutoConfig.for_model("bert", **small)).eval()
    program = skink.capture(model)
    Pipeline((Canonicalize(),)).run(program)
    return program


@pytest.mark.parametrize("checkpointing", [False, True])
def test_encoders_are_matched_layer_by_layer(checkpointing: bool) -> None:
    original, program = encoder(), encoder().clone()
    for name, tensor in list(program.weights()):
        if name.endswith("dense.weight"):
            program.set_weight(name, tensor * 1.1)
    module = student(program, original, Terms(hidden=1.0, attention=1.0), checkpointing=checkpointing)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    (given,) = token_batches(program, torch.randint(3, 97, (2, 5)), padding=mask)
    found, made = gradients(module, given)
    # Every token of text counts, the last one too.
    assert int(found["tokens"]) == 9
    assert 0 < float(found["hidden"]) < 9
    assert 0 < float(found["attention"]) < 9
    assert all(gradient is not None for name, gradient in made.items() if ".layer." in name)
    same = student(original, original, Terms(hidden=1.0, attention=1.0))(**given)
    assert float(same["loss"].detach()) == 0.0


@pytest.mark.parametrize("terms", [Terms(ce=1.0), Terms(kl=1.0), Terms(hidden=1.0, js=1.0)])
def test_encoders_have_no_logits_to_train_on(terms: Terms) -> None:
    with pytest.raises(OptionError, match=r"\[OPTION-002\] (ce|kl|js) needs a model with logits.*last_hidden_state"):
        student(encoder(), encoder(), terms)


def test_a_model_that_sees_the_next_token_cannot_learn_to_guess_it() -> None:
    program = encoder("bert-masked")
    assert program.outputs == ("logits",)
    with pytest.raises(OptionError, match=r"\[OPTION-002\] .*looks both ways"):
        student(program, program, Terms(ce=1.0, kl=1.0))
    (given,) = token_batches(program, torch.randint(3, 97, (2, 5)))
    found = student(program, program, Terms(kl=1.0))(**given)
    assert int(found["tokens"]) == 8
    assert float(found["kl"]) == 0.0


class Frames(nn.Module):
    """Takes no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x).relu())


def test_models_without_tokens_are_matched_layer_by_layer() -> None:
    program = skink.capture(Frames(), (torch.randn(3, 5, 8),), dims={"x": {0: "B", 1: "T"}})
    Pipeline((Canonicalize(),)).run(program)
    assert main_input(program).name == "x"
    other = program.clone()
    other.set_weight("layers.1.weight", program.weight("layers.1.weight") * 0.0)
    other.set_weight("layers.1.bias", program.weight("layers.1.bias") * 0.0)
    found = student(other, program, Terms(hidden=1.0))(x=torch.randn(2, 4, 8))
    # Of two layers one is as it was and the other gives nothing: half of what could be wrong, at each of 8 tokens.
    torch.testing.assert_close(float(found["hidden"]), 4.0)
    assert int(found["tokens"]) == 8


class Rounding(nn.Module):
    """Rounds to half precision in its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x).to(torch.bfloat16).to(torch.float32))


class Seen(TorchDispatchMode):
    """The dtypes that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.dtypes.add(result.dtype)
        return result


def test_in_float32_nothing_is_rounded_to_less() -> None:
    program = skink.capture(Rounding(), (torch.randn(3, 5, 8),), dims={"x": {0: "B", 1: "T"}})
    Pipeline((Canonicalize(),)).run(program)
    module = student(program, program, Terms(hidden=1.0))
    with Seen() as seen:
        module(x=torch.randn(2, 4, 8))["loss"].backward()
    assert seen.dtypes == {torch.float32}


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
        student(canonical("llama"), teacher(), Terms(kl=1.0))


def test_places_that_no_student_has_are_refused() -> None:
    with pytest.raises(RecoveryError, match=r"\[RECOVER-007\]"):
        student(canonical("llama"), canonical("gpt2"), Terms(hidden=1.0))


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(OptionError, match=r"\[OPTION-002\] precision='bf16' is unknown(.|\n)*bfloat16"):
        student(canonical("llama"), None, Terms(ce=1.0), precision="bf16")


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
        student(program, None, Terms(ce=1.0))(**given)


def test_losses_are_in_nats() -> None:
    program = canonical("llama")
    for name, tensor in list(program.weights()):
        if name == "lm_head.weight":
            program.set_weight(name, torch.zeros_like(tensor))
    found = student(program, None, Terms(ce=2.0))(**inputs(program))
    torch.testing.assert_close(float(found["ce"]), int(found["tokens"]) * math.log(97), rtol=1e-6, atol=0)
    torch.testing.assert_close(float(found["loss"].detach()), 2 * float(found["ce"]), rtol=1e-6, atol=0)
