"""Layers train as the Hugging Face layers that they come from."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skink.graph.program import Program
from skink.graph.windows import Windows
from skink.training.layerwise.match_layers import match_layers
from tests.models import build
from tests.programs import canonical
from tests.training.layerwise.factored import BOTH, options, text


class Reference:
    """A Hugging Face layer as it is, fed with what another model's layer receives."""

    def __init__(self, index: int) -> None:
        self.teacher, self.student = build("llama"), build("llama")
        with torch.no_grad():
            for parameter in self.student.parameters():
                generator = torch.Generator().manual_seed(parameter.numel())
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        self.index = index

    def programs(self) -> tuple[Program, Program]:
        original = canonical("llama")
        program = original.clone()
        known = dict(self.student.named_parameters())
        for name, _ in original.weights():
            if name in known:
                program.set_weight(name, known[name].detach().clone())
        return original, program

    def values(self, windows: Windows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the teacher's layer receives and gives, the student's for the same, and both attention outputs."""
        seen: dict[str, Any] = {}
        layer = self.teacher.model.layers[self.index]

        def keep(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            seen.update(x=args[0], kwargs=kwargs, y=result if isinstance(result, Tensor) else result[0])

        def attention(name: str) -> Any:
            return lambda module, args, result: seen.update({name: result})

        handles = [
            layer.register_forward_hook(keep, with_kwargs=True),
            layer.self_attn.o_proj.register_forward_hook(attention("a")),
        ]
        with torch.no_grad():
            self.teacher(input_ids=windows.tokens, attention_mask=windows.padding, use_cache=False)
        other = self.student.model.layers[self.index]
        handles.append(other.self_attn.o_proj.register_forward_hook(attention("b")))
        made = other(seen["x"], **seen["kwargs"])
        for handle in handles:
            handle.remove()
        return seen["x"], seen["y"], made if isinstance(made, Tensor) else made[0], seen["a"], seen["b"]

    def loss(self, windows: Windows, measured: Windows) -> Tensor:
        _, y, made, a, b = self.values(windows)
        xs, ys, _, everything, _ = self.values(measured)
        real = torch.ones_like(windows.tokens) if windows.padding is None else windows.padding
        all_real = torch.ones_like(measured.tokens) if measured.padding is None else measured.padding
        tokens = all_real.sum()
        hidden_scale = ((ys - xs).square().sum(-1) * all_real).sum() / tokens
        attention_scale = (everything.square().sum(-1) * all_real).sum() / tokens
        hidden = ((made - y).square().sum(-1) * real).sum() / real.sum() / hidden_scale
        return hidden + 0.5 * ((b - a).square().sum(-1) * real).sum() / real.sum() / attention_scale


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_a_layer_trains_as_the_hugging_face_layer_does_by_plain_pytorch(index: int, padded: bool) -> None:
    reference, windows = Reference(index), text(6, padded=padded)
    original, program = reference.programs()
    given = options(steps=3, batch=6, micro_batch=0, schedule="constant", warmup=0.0, clip=0.0, weight_decay=0.1)
    record = match_layers(original, program, windows, given, terms=BOTH, train="all")
    expected = float(reference.loss(windows, windows).detach())
    assert record.layers[index].before == pytest.approx(expected, rel=1e-4)
    layer = reference.student.model.layers[index]
    groups = [
        {"params": [entry for entry in layer.parameters() if entry.dim() > 1], "weight_decay": 0.1},
        {"params": [entry for entry in layer.parameters() if entry.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    for _ in range(3):
        optimizer.zero_grad()
        reference.loss(windows, windows).backward()
        optimizer.step()
    for name, parameter in layer.named_parameters():
        found = program.weight(f"model.layers.{index}.{name}")
        # Adam's steps hang on the sign of the smallest gradients too.
        assert (found - parameter).abs().mean() < 1e-5, name
    assert record.layers[index].after == pytest.approx(float(reference.loss(windows, windows).detach()), rel=1e-3)
