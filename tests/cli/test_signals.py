"""Signals that come where Python drops exceptions."""

import subprocess
import sys

import pytest

from skink.cli.signals import _Interrupt
from tests.cli.conftest import ROOT, environment

SCRIPT = """
import os, signal, sys, time, weakref
signal.signal(signal.SIGINT, signal.default_int_handler)
from skink.cli.signals import hear_signals
hear_signals()

def send(*_):
    os.kill(os.getpid(), signal.{signal})
    for _ in range(1000):
        pass  # the handler is called in here, and what it raises is dropped

class Thing:
    {method}

thing = Thing()
watch = weakref.ref(thing, {callback})
try:
    del thing
    print("dropped", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("signal", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize(("method", "callback"), [("__del__ = send", "None"), ("pass", "send")], ids=["del", "weakref"])
def test_a_signal_that_python_drops_is_sent_again(signal: str, code: int, method: str, callback: str) -> None:
    script = SCRIPT.format(signal=signal, method=method, callback=callback)
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=50
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("dropped\n", "", code)


def test_other_errors_that_are_dropped_are_told() -> None:
    script = SCRIPT.format(signal="SIGTERM", method="def __del__(self): raise ValueError('mine')", callback="None")
    script = script.replace("time.sleep(60)", "")
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert "ValueError: mine" in ran.stderr
    assert ran.returncode == 0


def test_a_second_interrupt_at_once_is_not_heard() -> None:
    interrupt = _Interrupt()
    with pytest.raises(KeyboardInterrupt):
        interrupt(2, None)
    interrupt(2, None)
    interrupt.forget()
    with pytest.raises(KeyboardInterrupt):
        interrupt(2, None)
