"""Small modules for tests: a body given as a function, and weights by name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skink.graph.capture import capture
from skink.graph.program import Program


class One(nn.Module):
    """`body(self, x)`; tensors given by name are buffers, parameters and modules are what they are."""

    def __init__(self, body: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class Two(One):
    """`body(self, x, y)`."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.body(self, x, y)


class Three(One):
    """`body(self, x, y, z)`."""

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Any:  # type: ignore[override]
        return self.body(self, x, y, z)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A random parameter."""
    return nn.Parameter(torch.randn(shape).to(dtype))


def results(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
    """What a module returns, as a tuple."""
    with torch.no_grad():
        found = module(*inputs)
    return found if isinstance(found, tuple) else (found,)


class Small(nn.Module):
    """Embeds, scales and splits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)

    def forward(self, tokens: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        one, other = (self.embed(tokens) * scale).chunk(2, -1)
        return one[..., 2:], other.reshape(tokens.shape[0] * tokens.shape[1], 4).half()


def small_program() -> Program:
    """A program of two inputs and two results, with sizes that are computed."""
    return capture(Small(), (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 1)))
