"""Encoders, and models that read no tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import skink
from skink.errors import OptionError
from skink.graph.calibration import token_batches
from skink.graph.pipeline import Pipeline
from skink.passes.canonicalize import Canonicalize
from skink.training.losses.objectives import Terms
from skink.training.losses.student import Student, main_input
from tests.training.losses.examples import encoder, gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_encoders_are_matched_layer_by_layer(checkpointing: bool) -> None:
    original, program = encoder(), encoder().clone()
    for name, tensor in list(program.weights()):
        if name.endswith("dense.weight"):
            program.set_weight(name, tensor * 1.1)
    module = Student(program, original, Terms(hidden=1.0, attention=1.0), checkpointing=checkpointing)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    (given,) = token_batches(program, torch.randint(3, 97, (2, 5)), padding=mask)
    found, made = gradients(module, given)
    # Every token of text counts, the last one too.
    assert int(found["tokens"]) == 9
    assert 0 < float(found["hidden"]) < 9
    assert 0 < float(found["attention"]) < 9
    assert all(gradient is not None for name, gradient in made.items() if ".layer." in name)
    same = Student(original, original, Terms(hidden=1.0, attention=1.0))(**given)
    assert float(same["loss"].detach()) == 0.0


@pytest.mark.parametrize("terms", [Terms(ce=1.0), Terms(kl=1.0), Terms(hidden=1.0, js=1.0)])
def test_encoders_have_no_logits_to_train_on(terms: Terms) -> None:
    with pytest.raises(OptionError, match=r"\[OPTION-002\] (ce|kl|js) needs a model with logits.*last_hidden_state"):
        Student(encoder(), encoder(), terms)


def test_a_model_that_sees_the_next_token_cannot_learn_to_guess_it() -> None:
    program = encoder("bert-masked")
    assert program.outputs == ("logits",)
    with pytest.raises(OptionError, match=r"\[OPTION-002\] .*looks both ways"):
        Student(program, program, Terms(ce=1.0, kl=1.0))
    (given,) = token_batches(program, torch.randint(3, 97, (2, 5)))
    found = Student(program, program, Terms(kl=1.0))(**given)
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
    found = Student(other, program, Terms(hidden=1.0))(x=torch.randn(2, 4, 8))
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
    module = Student(program, program, Terms(hidden=1.0))
    with Seen() as seen:
        module(x=torch.randn(2, 4, 8))["loss"].backward()
    assert seen.dtypes == {torch.float32}
