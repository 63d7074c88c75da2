"""Kernels on more threads than the machine has, called by several callers at once."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


def same_bits(run: Callable[..., Tensor], calls: Sequence[tuple[Any, ...]], *, rounds: int = 100) -> bool:
    """Whether each call gives on 8 threads, to three callers at once, always the bits that it gives on one thread."""
    # PyTorch's number of threads is that of the thread which asks.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as alone:
        expected = list(alone.map(lambda given: run(*given), calls))

    def right(_: int) -> bool:
        pairs = list(zip(calls, expected, strict=True)) * rounds
        return all(torch.equal(run(*given), bits) for given, bits in pairs)

    with ThreadPoolExecutor(3, initializer=torch.set_num_threads, initargs=(8,)) as callers:
        return all(callers.map(right, range(3)))
