"""What tests train with: every term at once, a batch, a model with other numbers, an encoder."""

from functools import cache

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

import skink
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.passes.canonicalize import Canonicalize
from skink.training.losses.objectives import Terms
from skink.training.losses.student import Student
from tests.programs import batch, canonical

EVERY = Terms(ce=1.0, kl=0.5, reverse_kl=0.25, js=2.0, hidden=3.0, attention=1.5, temperature=2.0)


def inputs(program: Program, *, size: int = 2, length: int = 8, padding: int = 3) -> dict[str, Tensor]:
    """Tokens with padding on the left, as the program takes them."""
    given = batch(size, length, padding)._asdict()
    return {entry.name: given[entry.name] for entry in program.inputs}


def gradients(module: Student, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """What a student says of a batch, and the gradient of each parameter."""
    found = module(**given)
    found["loss"].backward()
    return found, {name: parameter.grad for name, parameter in module.model.named_parameters()}


@cache
def perturbed(family: str) -> Program:
    """A model of a family, each weight a little off. Not to be changed."""
    program = canonical(family)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in list(program.weights()):
        if name not in program.buffers:
            noise = torch.randn(tensor.shape, generator=generator)
            program.set_weight(name, tensor + 0.02 * noise)
    return program


@cache
def encoder(kind: str = "bert") -> Program:
    """A small BERT, with a head for masked words where `kind` is another. Not to be changed."""
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
