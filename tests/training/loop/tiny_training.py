"""A module to train and text to train it on: small enough for tests, and what `train` asks of a module."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skink.graph.windows import Windows

VOCABULARY = 13


class Next(nn.Module):
    """Guesses the next token from this one; with layers that FSDP2 wraps, a norm that it does not, and a frozen one."""

    def __init__(self, *, dropout: float = 0.0, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.layers = nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8, bias=False)})
        self.norm = nn.Parameter(torch.ones(8))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
        x = self.table(tokens)
        x = x + self.layers["down"](functional.silu(self.layers["up"](self.frozen(x))))
        logits = self.head(self.dropout(functional.layer_norm(x, (8,)) * self.norm))[:, :-1]
        each = functional.cross_entropy(logits.float().mT, tokens[:, 1:], reduction="none")
        counted = torch.ones_like(each) if padding is None else (padding[:, 1:] * padding[:, :-1]).to(each.dtype)
        ce = (each * counted).sum()
        return {"loss": 2 * ce, "tokens": counted.sum(), "ce": ce.detach()}


def next_module(**options: Any) -> Next:
    """One and the same module at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Next(**options)


def text(windows: int = 21, length: int = 6, *, seed: int = 0, padded: bool = False) -> Windows:
    """Windows of a text that can be learnt: most tokens follow from the one before."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (windows, length), generator=generator)
    for place in range(1, length):
        keep = torch.rand(windows, generator=generator) < 0.8
        tokens[:, place] = torch.where(keep, (tokens[:, place - 1] * 5 + 3) % VOCABULARY, tokens[:, place])
    padding = None
    if padded:
        ends = torch.randint(2, length + 1, (windows,), generator=generator)
        padding = (torch.arange(length)[None] < ends[:, None]).long()
    return Windows(tokens, padding=padding)


def make_inputs(tokens: Tensor, padding: Tensor | None) -> dict[str, Any]:
    """As `Next` takes them."""
    return {"tokens": tokens} if padding is None else {"tokens": tokens, "padding": padding}
