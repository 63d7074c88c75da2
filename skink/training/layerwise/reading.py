"""Which windows the steps of layers read, and what programs are given for them."""

import torch
from torch import Tensor

from skink.graph.calibration import real_tokens, token_batches
from skink.graph.program import Program
from skink.graph.windows import Windows
from skink.training.loop.options import TrainOptions
from skink.training.loop.order import Order, text_lengths
from skink.training.loop.steps import windows_read

# Tokens of the text that layers' changes and errors are measured on, before and after.
_MEASURED = 2**15


class Reading:
    """A text, as every layer reads it: the same windows in the same steps.

    Rows are places among the windows that some step reads, since values are held for these and for no others.

    Args:
        program: whose inputs are made.
        text: windows.
        options: of the steps.

    Attributes:
        count: how many windows are read.
        size: most windows at once.
        steps: of each layer.
    """

    def __init__(self, program: Program, text: Windows, options: TrainOptions) -> None:
        self._program, self._text, self._lengths = program, text, text_lengths(text)
        self._order, self._batch = Order(len(text.tokens), options.seed), options.batch
        self._places = windows_read(text, self._order, options)
        self._used = torch.arange(len(text.tokens))
        if self._places < len(text.tokens):
            self._used = self._order.rows(0, self._places).sort().values
        self.count, self.size = len(self._used), options.micro_batch or options.batch
        self.steps = -(-self._places // options.batch)

    def all(self) -> Tensor:
        """All rows: int64[count]."""
        return torch.arange(self.count)

    def step(self, step: int) -> Tensor:
        """The rows of a step: int64[batch], fewer in the last one."""
        start = step * self._batch
        rows = self._order.rows(start, min(start + self._batch, self._places))
        return torch.searchsorted(self._used, rows)

    def sample(self) -> Tensor:
        """The rows that layers are measured on, evenly spread."""
        count = min(self.count, max(1, _MEASURED // self._text.tokens.shape[1]))
        return torch.linspace(0, self.count - 1, count).round().long()

    def parts(self, rows: Tensor) -> int:
        """How many micro-batches these rows make."""
        return -(-len(rows) // self.size)

    def tokens(self, rows: Tensor) -> int:
        """How many tokens of text these rows hold."""
        if self._lengths is None:
            return len(rows) * self._text.tokens.shape[1]
        return int(self._lengths[self._used[rows]].sum())

    def inputs(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """The programs' inputs for some rows, and which of their tokens count: bool[n, T], None where all do."""
        chosen = self._used[rows]
        padding = None if self._text.padding is None else self._text.padding[chosen]
        inputs = token_batches(self._program, self._text.tokens[chosen], batch=len(rows), padding=padding)[0]
        return inputs, real_tokens(inputs)
