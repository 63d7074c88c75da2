"""Skink models in transformers' Auto classes, without importing transformers before its user does.

`AutoConfig` finds a configuration class by `model_type` in a table of transformers. Where transformers is loaded
already, ours is entered at once; otherwise when that table's module is first imported, which a finder on
`sys.meta_path` notices: it answers for that one module, hands its loading to the regular loader, and goes.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLE_MODULE = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Let `AutoConfig`, the Auto classes of models and `pipeline` know Skink folders, now or once they are imported."""
    if _TABLE_MODULE in sys.modules:
        _register_config()
    elif not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


def register_model() -> None:
    """Let `AutoModelForCausalLM` and its like know our classes; called when a Skink configuration is made."""
    import transformers

    from skink.export.huggingface.config import SkinkConfig
    from skink.export.huggingface.forms import FORMS

    for form in FORMS:
        getattr(transformers, form.auto).register(SkinkConfig, form.model_class, exist_ok=True)


def _register_config() -> None:
    from transformers import AutoConfig

    from skink.export.huggingface.config import SkinkConfig

    AutoConfig.register(SkinkConfig.model_type, SkinkConfig, exist_ok=True)


class _TableFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """The regular loader, and registration afterwards."""

    def __init__(self, regular: Loader) -> None:
        self._regular = regular

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._regular.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps the loader that can give its source, for tracebacks and `inspect`.
        if module.__spec__ is not None:
            module.__spec__.loader = self._regular
        module.__loader__ = self._regular
        self._regular.exec_module(module)
        _register_config()
