"""What a module says of its batches, summed over batches and processes."""

import torch
from torch import Tensor

from skink.training.loop.processes import Processes


class Sums:
    """The sums that a module returns, and then their means over the tokens that count.

    Every process adds as many batches, so that all have the same names; float64.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._total: Tensor | None = None

    def add(self, found: dict[str, Tensor], *, counts: bool = True) -> None:
        """Add scalars by name, `tokens` among them; nothing but their names where the batch does not count."""
        self._names = sorted(found)
        row = torch.stack([torch.as_tensor(found[name]).detach().double() for name in self._names])
        row = row if counts else torch.zeros_like(row)
        self._total = row if self._total is None else self._total + row

    def means(self, group: Processes) -> tuple[dict[str, float], float]:
        """Means by name, without `tokens`, and the number of tokens, 1 where none counts; called by all processes."""
        if self._total is None:
            raise RuntimeError("no batch was added")
        totals = dict(zip(self._names, group.sum(self._total).tolist(), strict=True))
        tokens = max(1.0, totals.pop("tokens"))
        return {name: total / tokens for name, total in totals.items()}, tokens
