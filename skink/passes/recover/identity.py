"""Which training a checkpoint belongs to."""

import hashlib
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from skink.graph.program import Program
from skink.graph.versions import versions
from skink.graph.windows import Windows

# A change of one of these may change what a step computes.
_PACKAGES = ("skink", "torch")
_BLOCK = 1 << 26


def identity(
    line: str, seed: int, text: Windows, held_out: Windows | None, program: Program, original: Program | None
) -> str:
    """SHA-256 in hexadecimal of all that decides what a training comes to: two that differ in any of it share none.

    Args:
        line: the pass, with every option.
        seed: of everything random.
        text: what it trains on.
        held_out: what it chooses its weights by; None: it does not choose.
        program: what it trains, as it begins.
        original: what it learns from, or None.
    """
    known = versions()
    about = [line, seed, {name: known.get(name, "") for name in _PACKAGES}]
    digest = hashlib.sha256(json.dumps(about).encode())
    for windows in (text, held_out):
        tensors = () if windows is None else (windows.tokens, windows.padding)
        shapes = [None if tensor is None else list(tensor.shape) for tensor in tensors]
        digest.update(f"{windows and windows.sha256} {shapes}\n".encode())
        for tensor in tensors:
            for block in _blocks(tensor) if tensor is not None else ():
                digest.update(block)
    for each in (program, original) if original is not None else (program,):
        for name, weight in sorted(each.weights()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
            for block in _blocks(weight):
                digest.update(block)
    return digest.hexdigest()


def _blocks(tensor: Tensor) -> Iterator[bytes]:
    """A tensor's bytes, some at a time: text and weights may be larger than what is free."""
    for part in tensor.detach().reshape(-1).split(_BLOCK // tensor.element_size()):
        yield part.cpu().contiguous().view(torch.uint8).numpy().tobytes()
