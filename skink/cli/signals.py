"""Signals that end a command, as exceptions, so that folders which are being written are removed.

A signal may come while Python runs a `__del__` or a callback of its own. What is raised there is dropped, and
`sys.unraisablehook` told: such a signal is sent once more.
"""

import math
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from skink.cli.console import TERMINATED

# Seconds.
_DEAF = 2.0
_AGAIN = 0.05


class _Terminated(SystemExit):
    """SIGTERM came."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated(TERMINATED)


class _Interrupt:
    """Ctrl-C. Pressed again at once it is not heard, so that what the first one began, removing half-written folders,
    comes to its end."""

    def __init__(self) -> None:
        self._last = -math.inf

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last > _DEAF:
            self._last = now
            raise KeyboardInterrupt

    def forget(self) -> None:
        """The last one was dropped: the next is the first."""
        self._last = -math.inf


def hear_signals() -> None:
    """From now on SIGTERM raises SystemExit(143), and Ctrl-C KeyboardInterrupt, at the latest when the code that drops
    them is left. Where Ctrl-C is ignored, as in a background job, it stays so."""
    signal.signal(signal.SIGTERM, _terminate)
    interrupt = _Interrupt()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    tell = sys.unraisablehook

    def dropped(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, _Terminated):
            _send_again(signal.SIGTERM)
        elif isinstance(unraisable.exc_value, KeyboardInterrupt):
            interrupt.forget()
            _send_again(signal.SIGINT)
        else:
            tell(unraisable)

    sys.unraisablehook = dropped


def _send_again(number: signal.Signals) -> None:
    # Not at once: whatever drops exceptions is still running.
    timer = threading.Timer(_AGAIN, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
