"""Layout changes that undo each other meet and go."""

from typing import Any

import pytest
import torch

from skink.graph.pattern import op_name
from tests.modules import One
from tests.passes.canonicalize.checking import HEADS, check


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (lambda self, x: x.transpose(1, 2).transpose(1, 2).relu(), ["relu"]),
        (lambda self, x: x.transpose(1, 2).transpose(-2, 1).relu(), ["relu"]),
        (lambda self, x: x.transpose(1, 2).permute(0, 2, 1, 3).relu(), ["relu"]),
        (lambda self, x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2).relu(), ["relu"]),
        (lambda self, x: x.transpose(1, 2).transpose(2, 3), ["permute"]),
        (lambda self, x: x.transpose(1, 2).permute(0, 2, 3, 1), ["transpose"]),
        (lambda self, x: x.transpose(1, 2).transpose(2, 3).transpose(1, 2).transpose(1, 3).relu(), ["relu"]),
        (lambda self, x: x.flatten(0, 1).reshape(x.shape).relu(), ["relu"]),
        (lambda self, x: x.flatten(0, 1).reshape(x.shape[0], -1, 2, 4), ["sym_size", "reshape"]),
        (lambda self, x: x.reshape(-1, 8).reshape(x.shape[0], -1, 4), ["sym_size", "reshape", "reshape"]),
        (lambda self, x: x.transpose(1, 2), ["transpose"]),
    ],
)
def test_layouts(body: Any, kept: list[str]) -> None:
    _, reasons, program = check(One(body), HEADS, dims={"x": {0: "B", 2: "T"}})
    left = [op_name(node) for node in program.graph.nodes if node.op == "call_function"]
    assert reasons == []
    assert left == kept


def test_what_others_read_stays() -> None:
    body = lambda self, x: (x.transpose(1, 2).relu(), x.transpose(1, 2).transpose(1, 2).tanh())  # noqa: E731
    _, _, program = check(One(body), HEADS, dims={"x": {0: "B", 2: "T"}})
    left = [op_name(node) for node in program.graph.nodes if node.op == "call_function"]
    assert left == ["transpose", "relu", "tanh"]


def test_other_axes_are_joined_right() -> None:
    x = torch.randn(2, 3, 4, 5)
    for first in ((0, 3, 1, 2), (3, 0, 2, 1), (1, 0, 3, 2)):
        for second in ((0, 3, 1, 2), (2, 1, 3, 0)):
            check(One(lambda self, x, a=first, b=second: x.permute(a).permute(b)), x, dims={})
