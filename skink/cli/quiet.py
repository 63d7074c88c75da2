"""Keeps other packages' chatter off the terminal while a command runs."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

from skink.cli.console import NoteHandler, Session

# These log warnings that are about their own workings, some of them through handlers of their own.
_NOISY = ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir", "accelerate")


@contextlib.contextmanager
def quiet_python(session: Session) -> Iterator[None]:
    """Python warnings are dropped, other packages log errors only, and what they print goes to stderr.

    Skink's own warnings are printed as notes. Everything is as before afterwards.
    """
    handler = NoteHandler(session)
    own = logging.getLogger("skink")
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    propagated = own.propagate
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    own.addHandler(handler)
    own.propagate = False
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        own.removeHandler(handler)
        own.propagate = propagated
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers, nor of the hub; for commands that need it anyway."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    verbosity, hub_verbosity = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
