"""Symbolic sizes."""

from typing import Any

import torch

from skink.graph.capture import capture
from skink.graph.propagate import shape_context
from tests.modules import One


def symbolic(*names: str) -> dict[str, Any]:
    """A symbolic size for each name."""
    example = torch.zeros([2] * len(names))
    program = capture(One(lambda self, x: x + 1), (example,), dims={"x": dict(enumerate(names))})
    shape_context(program)
    shape = program.graph.find_nodes(op="placeholder")[0].meta["val"].shape
    return dict(zip(names, shape, strict=True))
