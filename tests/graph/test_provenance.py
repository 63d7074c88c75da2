"""Modules and lines that nodes and errors come from."""

from typing import Any

import pytest
import torch
from torch import fx

from skink.graph.provenance import provenance, source_line


def node(**meta: Any) -> fx.Node:
    found = fx.Graph().placeholder("x")
    found.meta.update(meta)
    return found


def trace(*files: str) -> str:
    return "".join(f'  File "{file}", line {line}, in forward\n    return x\n' for line, file in enumerate(files, 1))


@pytest.mark.parametrize(
    ("files", "source"),
    [
        (("/home/me/models/mine.py",), "models/mine.py:1"),
        (
            ("/env/site-packages/transformers/models/llama/modeling_llama.py",),
            "transformers/models/llama/modeling_llama.py:1",
        ),
        (("/a/b.py", "/env/site-packages/torch/nn/modules/linear.py"), "a/b.py:1"),
        (("/env/site-packages/torch/nn/modules/linear.py",), "torch/nn/modules/linear.py:1"),
        (("/a/b.py", "/c/skink/graph/frontends.py", "/env/site-packages/torch/fx/interpreter.py"), "a/b.py:1"),
    ],
)
def test_the_line_is_the_innermost_that_its_author_can_change(files: tuple[str, ...], source: str) -> None:
    assert provenance(node(stack_trace=trace(*files)), "") == {"source": source}


def test_lines_of_what_runs_a_traced_graph_are_none() -> None:
    files = ("/c/skink/graph/frontends.py", "/env/site-packages/torch/fx/interpreter.py")
    assert provenance(node(stack_trace=trace(*files)), "") == {}
    assert provenance(node(), "") == {}


def test_the_module_is_the_innermost_without_the_wrapper() -> None:
    stack = {"1": ("model.layers.0", object), "2": ("model.layers.0.up", object)}
    assert provenance(node(nn_module_stack=stack), "model.") == {"module": "layers.0.up"}
    unknown = {"1": ("_empty_nn_module_stack_from_metadata_hook", object)}
    assert provenance(node(nn_module_stack=unknown), "") == {}


def test_the_line_of_an_error_is_the_models_own() -> None:
    def forward() -> torch.Tensor:
        return torch.nn.functional.linear(torch.ones(2), torch.ones(3, 3))

    with pytest.raises(RuntimeError) as caught:
        forward()
    found = source_line(caught.value)
    assert "test_provenance.py:" in found
    assert "in forward: return torch.nn.functional.linear" in found
    assert source_line(RuntimeError()) == ""
