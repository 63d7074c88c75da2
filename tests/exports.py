"""`torch.export` takes most of the time of a tiny model's capture: the same model is exported once per process."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# What tests of capture itself are named by: these export every time.
_CAPTURE = (
    *(f"tests/graph/test_{name}" for name in ("capture", "frontends", "huggingface", "lift")),
    *("tests/docs/test_errors.py", "tests/end_to_end/"),
)


def remembered(export: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.export.export` that gives the graph of an equal Hugging Face model again.

    Models are equal where their configurations, modules, and weights' names, shapes, dtypes and ties are, and all of
    their code is from transformers or PyTorch. The graph holds no weights.
    """
    graphs: dict[Any, Any] = {}

    def export_once(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        model = getattr(module, "model", None)
        if os.environ.get("PYTEST_CURRENT_TEST", "").startswith(_CAPTURE) or not _is_known(model):
            return export(module, *arguments, **options)
        from skink.graph.capture import without_writes

        key = (_key(module, model), repr((arguments, options)))
        if key not in graphs:
            # As capture does, which then finds nothing left to do.
            graphs[key] = without_writes(export(module, *arguments, **options))
        return graphs[key]

    return export_once


def _is_known(model: Any) -> bool:
    return hasattr(model, "config") and all(
        type(part).__module__.startswith(("torch.", "transformers.")) for part in model.modules()
    )


def _key(module: nn.Module, model: Any) -> str:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    places: dict[int, int] = {}
    told = [
        (name, tuple(tensor.shape), tensor.dtype, places.setdefault(id(tensor), len(places)))
        for name, tensor in tensors
    ]
    values = sorted((name, repr(value)) for name, value in vars(module).items() if not name.startswith("_"))
    config = (model.config.to_json_string(use_diff=False), model.config._attn_implementation)
    return repr((type(model), model, told, values, config, torch.get_default_dtype()))
