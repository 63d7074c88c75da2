"""Calls of experts over a grid, and the formula written with loops in float64."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call: numbers of tokens, experts and choices, widths E and F, and options."""

    tokens: int = 7
    experts: int = 4
    choices: int = 2
    widths: tuple[int, int] = (6, 5)
    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    biases: bool = False
    limit: float = 0.0
    alpha: float = 1.0
    shift: float = 0.0

    def __str__(self) -> str:
        flags = [name for name in ("gated", "interleaved", "transposed", "biases") if getattr(self, name)]
        sizes = f"{self.tokens}x{self.choices}of{self.experts}-{self.widths[0]}x{self.widths[1]}"
        return f"{self.activation}-{sizes}-{self.limit:g}-{self.alpha:g}-{self.shift:g}-{'-'.join(flags)}"

    def arguments(self, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random tensors, and options by name; each token's choices differ."""
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

        (width, inner), number = self.widths, self.experts
        hidden = 2 * inner if self.gated else inner
        up = random(number, hidden, width, scale=width**-0.5)
        down = random(number, width, inner, scale=inner**-0.5)
        ranks = torch.rand(self.tokens, number, generator=generator)
        tensors = (
            random(self.tokens, width),
            ranks.argsort(-1)[:, : self.choices],
            torch.rand(self.tokens, self.choices, generator=generator, dtype=torch.float64).to(dtype),
            up.transpose(1, 2).contiguous() if self.transposed else up,
            down.transpose(1, 2).contiguous() if self.transposed else down,
            random(number, hidden) if self.biases else None,
            random(number, width) if self.biases else None,
        )
        names = ("activation", "gated", "interleaved", "transposed", "limit", "alpha", "shift")
        return tensors, {name: getattr(self, name) for name in names}


def cases() -> list[Case]:
    """Every option alone, those of known families together, one token and many, odd sizes, nothing at all."""
    return [
        Case(),
        Case(tokens=1),
        Case(tokens=0),
        Case(tokens=67, experts=5, choices=3, widths=(13, 65)),
        Case(tokens=3, experts=9, choices=1, widths=(1, 1)),
        Case(choices=4),
        *(Case(activation=name) for name in ("gelu", "gelu_tanh", "relu", "relu2")),
        Case(activation="relu2", gated=False),
        Case(interleaved=True),
        Case(transposed=True),
        Case(biases=True),
        Case(limit=0.5),
        Case(limit=0.5, gated=False, activation="relu"),
        Case(alpha=1.702),
        Case(shift=1.0),
        Case(transposed=True, biases=True, interleaved=True, limit=1.0, alpha=1.702, shift=1.0),
    ]


def _act(case: Case, x: float) -> float:
    match case.activation:
        case "silu":
            return x / (1 + math.exp(-case.alpha * x))
        case "gelu":
            return x / 2 * (1 + math.erf(x / math.sqrt(2)))
        case "gelu_tanh":
            return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case "relu":
            return max(x, 0.0)
        case _:
            return max(x, 0.0) ** 2


def formula(case: Case, tensors: tuple[Any, ...]) -> Tensor:
    """The mixture, one token and one choice at a time, in float64."""
    tokens, chosen, shares, up, down, up_bias, down_bias = (
        t.double() if t is not None and t.is_floating_point() else t for t in tensors
    )
    result = torch.zeros_like(tokens)
    inner = case.widths[1]
    for n, row in enumerate(chosen.tolist()):
        for k, expert in enumerate(row):
            into, out = (up[expert].T, down[expert].T) if case.transposed else (up[expert], down[expert])
            hidden = into @ tokens[n]
            if up_bias is not None:
                hidden = hidden + up_bias[expert]
            active = torch.zeros(inner, dtype=torch.float64)
            for f in range(inner):
                gate = float(hidden[2 * f] if case.interleaved else hidden[f])
                other = 1.0
                if case.gated:
                    other = float(hidden[2 * f + 1] if case.interleaved else hidden[inner + f])
                if case.limit:
                    gate, other = min(gate, case.limit), max(-case.limit, min(other, case.limit))
                active[f] = _act(case, gate) * (other + case.shift if case.gated else 1.0)
            part = out @ active
            if down_bias is not None:
                part = part + down_bias[expert]
            result[n] += shares[n, k] * part
    return result
