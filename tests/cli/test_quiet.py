import logging
import sys
import warnings

import pytest

from skink.cli.console import Session
from skink.cli.quiet import quiet_python, quiet_transformers


def test_only_skink_itself_may_warn(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session.start(as_json=False)
    with quiet_python(session):
        warnings.warn("of somebody else", stacklevel=1)
        logging.getLogger("torch.onnx").warning("of torch")
        logging.getLogger("skink.kernels").warning("no kernels")
        sys.stdout.write("printed\n")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "no kernels\nprinted\n"


def test_everything_is_as_before_afterwards() -> None:
    from transformers.utils import logging as transformers_logging

    own = logging.getLogger("skink")
    before = (list(own.handlers), own.propagate, logging.getLogger("torch").level, transformers_logging.get_verbosity())
    bars = transformers_logging.is_progress_bar_enabled()
    with quiet_python(Session.start(as_json=False)), quiet_transformers():
        assert transformers_logging.get_verbosity() == logging.ERROR
        assert not transformers_logging.is_progress_bar_enabled()
    after = (list(own.handlers), own.propagate, logging.getLogger("torch").level, transformers_logging.get_verbosity())
    assert after == before
    assert transformers_logging.is_progress_bar_enabled() == bars
