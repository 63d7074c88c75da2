"""The ONNX form of a model: one graph with state, checked in a fresh process, and a runner on ONNX Runtime.

Loaded when asked for: the check's own process needs neither PyTorch's exporter nor onnx.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skink.export.onnx.check import CheckResult
    from skink.export.onnx.export import OnnxReport, export_onnx
    from skink.export.onnx.runner import OrtRunner

__all__ = ["CheckResult", "OnnxReport", "OrtRunner", "export_onnx"]

_PLACES = {"CheckResult": "check", "OnnxReport": "export", "OrtRunner": "runner", "export_onnx": "export"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
