"""A module through the whole export, without files of weights or a check: what PyTorch and ONNX Runtime make of it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from skink.export.onnx import export_onnx
from skink.export.onnx.session import OrtGraph
from skink.graph.capture import capture


def run_both(
    module: nn.Module, inputs: Mapping[str, Tensor], dims: Mapping[str, Mapping[int, str]], folder: Path
) -> tuple[list[np.ndarray], list[np.ndarray], onnx.ModelProto]:
    """(outputs of PyTorch in float64 where they are floating, outputs of ONNX Runtime, the graph)."""
    examples = {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
    export_onnx(capture(module, examples, dims=dims), folder, check=False)
    graph = OrtGraph(folder)
    rows = next(iter(inputs.values())).shape[0]
    found, _ = graph.run({name: tensor.numpy() for name, tensor in inputs.items()}, graph.empty_state(rows))
    with torch.no_grad():
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        expected = module.double()(**wide)
    return (
        [entry.numpy() for entry in expected],
        list(found.values()),
        onnx.load(folder / "model.onnx", load_external_data=False),
    )


def operators(model: onnx.ModelProto) -> list[str]:
    """Operators of the graph in order, constants aside."""
    return [node.op_type for node in model.graph.node if node.op_type != "Constant"]
