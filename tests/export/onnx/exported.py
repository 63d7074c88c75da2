"""Exported folders that tests share: made once per process, changed by nobody."""

import shutil
import tempfile
from functools import cache, lru_cache
from pathlib import Path

from skink.export.onnx import OnnxReport, export_onnx
from skink.export.onnx.export import _canonical
from skink.graph.program import Program
from tests.models import tiny


@cache
def program(family: str) -> Program:
    """The canonical program of a tiny model."""
    return _canonical(tiny(family))


@lru_cache(maxsize=1)
def _workspace() -> Path:
    return Path(tempfile.mkdtemp(prefix="skink-tests-onnx-"))


@cache
def exported(family: str) -> OnnxReport:
    """The export of a tiny model, unchecked."""
    model = tiny(family)
    return export_onnx(
        program(family),
        _workspace() / family,
        config=model.config,
        generation_config=model.generation_config,
        check=False,
    )


def remove_all() -> None:
    """Remove what was exported."""
    if _workspace.cache_info().currsize:
        shutil.rmtree(_workspace(), ignore_errors=True)
