"""Arguments of calls by name."""

import torch

from skink.graph.capture import capture
from skink.graph.pattern import op_name
from skink.passes.canonicalize.arguments import arguments_of
from tests.modules import One


def test_arguments_by_name() -> None:
    program = capture(One(lambda self, x: torch.var(x, -1, keepdim=True, correction=0)), (torch.randn(2, 3, 4),))
    (node,) = (node for node in program.graph.nodes if op_name(node) == "var")
    arguments = arguments_of(node)
    assert arguments["self"].op == "placeholder"
    assert {name: arguments[name] for name in ("dim", "correction", "keepdim")} == {
        "dim": [-1],
        "correction": 0,
        "keepdim": True,
    }


def test_defaults_are_filled_in() -> None:
    program = capture(One(lambda self, x: torch.softmax(x, -1)), (torch.randn(2, 3, 4),))
    (node,) = (node for node in program.graph.nodes if op_name(node) == "softmax")
    assert arguments_of(node)["dtype"] is None
