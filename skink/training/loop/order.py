"""Which windows a step reads, from the step's number alone, so that a run that is resumed needs no state for it."""

from functools import lru_cache

import torch
from torch import Tensor

from skink.graph.windows import Windows


class Order:
    """All windows in random order, then all again in another, without end.

    The order of each round is drawn from the seed and the round's number, and from nothing else.

    Args:
        windows: how many there are, from 1 on.
        seed: from 0 on.
    """

    def __init__(self, windows: int, seed: int) -> None:
        self.windows, self.seed = windows, seed
        # A step reads from at most the end of one round and the beginning of the next, where a batch is shorter than
        # a round; a longer batch is made from as many rounds as it takes.
        self._round = lru_cache(maxsize=2)(self._draw)

    def rows(self, start: int, stop: int) -> Tensor:
        """The windows at places start to stop - 1 of the order: int64[stop - start]."""
        parts = []
        while start < stop:
            number, place = divmod(start, self.windows)
            taken = min(stop - start, self.windows - place)
            parts.append(self._round(number)[place : place + taken])
            start += taken
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def places_for(self, tokens: int, lengths: Tensor | None, length: int) -> int:
        """How many windows hold at least `tokens` tokens, counted from the start of the order.

        Args:
            tokens: from 1 on.
            lengths: int64[N], tokens of text in each window; None: all have `length`.
            length: tokens of a window.
        """
        if lengths is None:
            return -(-tokens // length)
        rounds, left = divmod(tokens, int(lengths.sum()))
        if not left:
            return rounds * self.windows
        ends = lengths[self._round(rounds)].cumsum(0)
        return rounds * self.windows + int(torch.searchsorted(ends, left)) + 1

    def tokens_in(self, places: int, lengths: Tensor | None, length: int) -> int:
        """Tokens of text in the first `places` windows of the order; arguments as of `places_for`."""
        if lengths is None:
            return places * length
        rounds, left = divmod(places, self.windows)
        return rounds * int(lengths.sum()) + (int(lengths[self._round(rounds)[:left]].sum()) if left else 0)

    def _draw(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed << 24) + number)
        return torch.randperm(self.windows, generator=generator)


def text_lengths(windows: Windows) -> Tensor | None:
    """Tokens of text in each window, int64[N]; None where every token is text."""
    return None if windows.padding is None else windows.padding.ne(0).sum(1)
