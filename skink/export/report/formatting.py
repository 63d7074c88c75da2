"""Numbers and names as the reader sees them, alike in the terminal and on the page."""

import math
import re
from collections.abc import Mapping

from skink.export.report.measures import Setting

MINUS, TIMES, DASH = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
MISSING = DASH
# Control characters (terminal escapes, characters that XML forbids) and marks that reverse the reading order.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def clean(text: str) -> str:
    """`text` with each control character and each mark that reverses reading order shown as U+FFFD."""
    return _UNSAFE.sub("\ufffd", text)


def plain(value: float, digits: int = 4) -> str:
    """`value` with `digits` significant digits, thousands separated: 4.312, 1,234, 1.2e-07."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    rounded = float(f"{value:.{digits}g}")
    if rounded == 0:
        return "0"
    exponent = math.floor(math.log10(abs(rounded)))
    if not -4 <= exponent < 9:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    return f"{rounded:,.{max(digits - 1 - exponent, 0)}f}".replace("-", MINUS)


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while power < len(units) - 1 and float(f"{value:.3g}") >= 1000:
        value, power = value / 1000, power + 1
    return (str(int(value)) if power == 0 else plain(value, 3)) + (f" {units[power]}" if units[power] else "")


def count(value: float) -> str:
    """A count with a decimal prefix: 7.24 M."""
    return _scaled(value, ("", "k", "M", "G", "T"))


def size(value: float) -> str:
    """A number of bytes in decimal units: 29.0 MB."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def seconds(value: float) -> str:
    """A duration: 380 ms, 4.21 s, 3 min 05 s."""
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 59.95:
        return f"{plain(value, 3)} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s"


def ratio(value: float, decimals: int = 3) -> str:
    """A ratio: ×0.805; fewer decimals from 2 on."""
    if not math.isfinite(value):
        return f"{TIMES}{plain(value)}"
    if value >= 100:
        return f"{TIMES}{plain(value, 3)}"
    return f"{TIMES}{value:.{decimals if value < 2 else min(decimals, 2 if value < 10 else 1)}f}"


def change(value: float, decimals: int = 1) -> str:
    """A ratio as a signed percentage, −19.5%; as a ratio, from 3 on."""
    if not math.isfinite(value) or value >= 3:
        return ratio(value)
    percent = round(100 * (value - 1), decimals)
    sign = "+" if percent > 0 else MINUS if percent < 0 else "±"
    return f"{sign}{abs(percent):.{decimals}f}%"


def setting(value: Setting) -> str:
    """The value of one setting."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings(values: Mapping[str, Setting]) -> str:
    """Settings on one line: "windows 64 · stride 512"."""
    return " · ".join(f"{key.replace('_', ' ')} {setting(value)}" for key, value in values.items())


def shorten(text: str, length: int) -> str:
    """`text` in at most `length` characters, the middle left out: both ends of a qualified name matter."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"
