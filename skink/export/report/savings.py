"""What "20% smaller" means: parameters, bytes, multiply-accumulates and latency, of the linear layers and of all.

No one of them stands for the others, so they are always shown together.
"""

from collections.abc import Callable
from dataclasses import dataclass

from skink.export.report import formatting as fmt
from skink.export.report.losses import loss_sentence
from skink.export.report.measures import Saved, Saving
from skink.export.report.model import Report
from skink.export.report.summary import Cell, Tone

LINEAR, MODEL = "Linear layers", "Whole model"
_EVEN = 5e-4


def _milliseconds(seconds: float) -> str:
    return f"{fmt.plain(seconds * 1e3, 3)} ms"


_UNITS: dict[str, tuple[str, Callable[[float], str]]] = {
    "params": ("Parameters", fmt.count),
    "bytes": ("Bytes", fmt.size),
    "flops": ("MACs per token", fmt.count),
    "latency": ("Latency", _milliseconds),
}


@dataclass(frozen=True)
class SavingRow:
    """One unit: "before → after" of the linear layers and of the whole model, each with its change."""

    label: str
    linear: Cell
    model: Cell


def saving_rows(report: Report) -> list[SavingRow]:
    """The table of what the recipe saves; empty where the report has none."""
    return [
        SavingRow(_UNITS[each.unit][0], _cell(each.linear, each), _cell(each.model, each)) for each in report.savings
    ]


def saving_lines(report: Report) -> list[str]:
    """What the words of the table mean, and what it was measured under."""
    if not report.savings:
        return []
    settings = {each.unit: each.settings for each in report.savings}
    lines = ["Linear layers are all but the output head; embeddings and norms count to the whole model only."]
    macs = fmt.settings(settings.get("flops", {}))
    lines.append(f"1 MAC is 2 FLOPs{f'; {macs}' if macs else ''}.")
    if "latency" in settings:
        under = f": {text}" if (text := fmt.settings(settings["latency"])) else ""
        lines.append(
            f"Latency is the time to read the prompt and then to step once for each new token{under}. "
            "Noise: the ranges over the rounds overlap."
        )
    return lines


def card_section(report: Report) -> str:
    """The table as a section of a model card, in Markdown; "" where the report has none."""
    rows = saving_rows(report)
    if not rows:
        return ""
    lines = ["## What was saved", "", f"| | {LINEAR.lower()} | {MODEL.lower()} |", "| --- | --- | --- |"]
    lines += [f"| {row.label} | {_text(row.linear)} | {_text(row.model)} |" for row in rows]
    lines += ["", *saving_lines(report)]
    if sentence := loss_sentence(report):
        lines += ["", sentence]
    return "\n".join(lines) + "\n"


def _text(cell: Cell) -> str:
    return f"{cell.text} {cell.ratio_text}".rstrip()


def _cell(saved: Saved | None, saving: Saving) -> Cell:
    if saved is None:
        return Cell(fmt.MISSING)
    shown = _UNITS[saving.unit][1]
    before, after = saved.before, saved.after
    text = f"{shown(before.value)} → {shown(after.value)}"
    if before.value == 0:
        return Cell(text, value=after.value)
    ratio = after.value / before.value
    tone: Tone = "even" if abs(ratio - 1) < _EVEN else "better" if ratio < 1 else "worse"
    change = fmt.change(ratio)
    ranged = None not in (before.low, before.high, after.low, after.high)
    if ranged and before.low <= after.high and after.low <= before.high:  # type: ignore[operator]
        tone, change = "even", f"{change} (noise)"
    return Cell(text, ratio, change, tone, after.value, after.low, after.high)
