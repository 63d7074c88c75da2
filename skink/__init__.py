"""Skink: a compiler for smaller, faster language models.

Names are loaded when they are first used: `import skink` touches no GPU, no compiler, and none of its dependencies but
PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from skink.export.huggingface.registration import register

if TYPE_CHECKING:
    from skink.compression import compress
    from skink.errors import SkinkError
    from skink.exploration import Exploration, ExploreOptions, explore
    from skink.export.huggingface import SkinkForCausalLM, load
    from skink.export.onnx import export_onnx
    from skink.graph.capture import capture
    from skink.graph.passes import Pass
    from skink.graph.pipeline import Pipeline
    from skink.graph.program import Program

# Lets AutoConfig and AutoModelForCausalLM read Skink folders, as soon as somebody imports transformers.
register()

_HOMES = {
    "Exploration": "skink.exploration",
    "ExploreOptions": "skink.exploration",
    "Pass": "skink.graph.passes",
    "Pipeline": "skink.graph.pipeline",
    "Program": "skink.graph.program",
    "SkinkError": "skink.errors",
    "SkinkForCausalLM": "skink.export.huggingface",
    "capture": "skink.graph.capture",
    "compress": "skink.compression",
    "explore": "skink.exploration",
    "export_onnx": "skink.export.onnx",
    "load": "skink.export.huggingface",
}

__all__ = [
    "Exploration",
    "ExploreOptions",
    "Pass",
    "Pipeline",
    "Program",
    "SkinkError",
    "SkinkForCausalLM",
    "capture",
    "compress",
    "explore",
    "export_onnx",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'skink' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
