"""The Hugging Face form: a model that loads, runs, trains and saves as any other of its kind.

Importing this package imports neither torch nor transformers: names are looked up when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from skink.export.huggingface.registration import register

if TYPE_CHECKING:
    from skink.export.huggingface.cache import SkinkCache
    from skink.export.huggingface.config import SkinkConfig
    from skink.export.huggingface.encoders import (
        SkinkForMaskedLM,
        SkinkForQuestionAnswering,
        SkinkForSequenceClassification,
        SkinkForTokenClassification,
        SkinkModel,
    )
    from skink.export.huggingface.loading import load, load_source
    from skink.export.huggingface.modeling import SkinkForCausalLM
    from skink.export.huggingface.saving import save, to_huggingface

_HOMES = {
    "SkinkCache": "cache",
    "SkinkConfig": "config",
    "SkinkForCausalLM": "modeling",
    "SkinkForMaskedLM": "encoders",
    "SkinkForQuestionAnswering": "encoders",
    "SkinkForSequenceClassification": "encoders",
    "SkinkForTokenClassification": "encoders",
    "SkinkModel": "encoders",
    "load": "loading",
    "load_source": "loading",
    "save": "saving",
    "to_huggingface": "saving",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = [
    "SkinkCache",
    "SkinkConfig",
    "SkinkForCausalLM",
    "SkinkForMaskedLM",
    "SkinkForQuestionAnswering",
    "SkinkForSequenceClassification",
    "SkinkForTokenClassification",
    "SkinkModel",
    "load",
    "load_source",
    "register",
    "save",
    "to_huggingface",
]
