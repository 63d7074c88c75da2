"""Where nodes and errors come from: modules, and lines of the model's own code."""

import re
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import fx

_RUNNERS = ("/skink/graph/frontends.py", "/torch/fx/interpreter.py", "/torch/_dynamo/functional_export.py")


def provenance(node: fx.Node, prefix: str) -> dict[str, Any]:
    """What is kept of the exporter's metadata: the module's qualified name and the source line."""
    meta: dict[str, Any] = {}
    stack = node.meta.get("nn_module_stack")
    if stack:
        name = next(reversed(stack.values()))[0].removeprefix(prefix)
        if name != "_empty_nn_module_stack_from_metadata_hook":
            meta["module"] = name
    trace = node.meta.get("stack_trace")
    if trace:
        frames = re.findall(r'File "(/[^"]*)", line (\d+)', trace)
        # What runs a traced graph is no line of the model.
        frames = [frame for frame in frames if not frame[0].endswith(_RUNNERS)]
        # PyTorch's own layers are the innermost frames; the line that called them is what its author can change.
        own = [frame for frame in frames if "/torch/" not in frame[0]] or frames
        if own:
            meta["source"] = f"{_portable_path(own[-1][0])}:{own[-1][1]}"
    return meta


def _portable_path(path: str) -> str:
    """A source file without this machine's folders: below site-packages, or its last two parts."""
    _, found, below = path.rpartition("/site-packages/")
    return below if found else "/".join(path.split("/")[-2:])


def source_line(error: BaseException) -> str:
    """The innermost line of the model's own code in the traceback."""
    torch_folder = str(Path(torch.__file__).parent)
    own_folder = str(Path(__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((torch_folder, own_folder)) and not frame.filename.startswith("<")
    ]
    if not frames:
        return ""
    frame = frames[-1]
    return f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}"
