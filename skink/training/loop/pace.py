"""How fast a run goes and how long it still takes, in a few words."""

import time
from collections.abc import Callable

# Share of the newest step in the rate: about the last ten steps count.
_NEWEST = 0.1


class Pace:
    """Tokens a second, smoothed over the last steps (an exponential mean).

    Args:
        clock: seconds from some moment on.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last = clock()
        self._rate: float | None = None

    def add(self, tokens: int) -> None:
        """A step of so many tokens has just ended."""
        now = self._clock()
        rate = tokens / max(now - self._last, 1e-9)
        self._rate = rate if self._rate is None else (1 - _NEWEST) * self._rate + _NEWEST * rate
        self._last = now

    def text(self, loss: float, tokens_left: int) -> str:
        """What a progress bar says: `loss 2.134 · 12.3k tokens/s · 4 min left`."""
        said = f"loss {loss:.3f}"
        if self._rate:
            said += f" · {_short(self._rate)} tokens/s · {_duration(tokens_left / self._rate)} left"
        return said


def _short(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
