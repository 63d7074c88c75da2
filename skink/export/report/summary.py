"""What the terminal and the page both show: the headline table, settings, and layers grouped by their role."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from skink.export.report import formatting as fmt
from skink.export.report.measures import Form, Perplexity, Rate, Setting, Speed
from skink.export.report.model import Report

Tone = Literal["better", "worse", "even"]
# A change smaller than this is no change to the reader.
_EVEN = 5e-4
# Losses in nats that differ by less are the same up to rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Cell:
    """One form's entry in a row. `ratio` is to the first form, None where there is nothing to compare.

    `value` is the number behind `text`, and `low` and `high` its range over repeats, where it has one.
    """

    text: str
    ratio: float | None = None
    ratio_text: str = ""
    tone: Tone = "even"
    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One quantity over all forms. A `minor` row explains the row above it; `quantity` finds its settings."""

    label: str
    cells: tuple[Cell, ...]
    minor: bool = False
    quantity: str = ""


@dataclass(frozen=True)
class SettingsLine:
    """What the numbers of one `quantity` were measured under; `label` names the form too, where forms differ."""

    quantity: str
    label: str
    text: str


def headline(report: Report) -> list[Row]:
    """The rows of the headline table; quantities that no form has are left out."""
    forms = report.forms
    rows = [
        _row("Parameters", forms, lambda form: form.parameters, fmt.count),
        _row("linear layers", forms, lambda form: form.linear_parameters, fmt.count, minor=True),
        _row("Bytes", forms, lambda form: form.bytes, fmt.size),
        _row(
            "MACs per token",
            forms,
            lambda form: form.macs_per_token,
            fmt.count,
            quantity="MACs",
        ),
    ]
    if any(form.perplexity for form in forms):
        rows += [
            _row(
                "Perplexity",
                forms,
                lambda form: form.perplexity.value if form.perplexity else None,
                quantity="Perplexity",
            ),
            _loss_row(forms),
        ]
    names = dict.fromkeys(measure.name for form in forms for measure in form.quality)
    rows += [_quality_row(name, forms) for name in names]
    if any(form.speed for form in forms):
        rows += _speed_rows("Prefill, tok/s", forms, lambda speed: speed.prefill, lambda speed: speed.prefill_ratio)
        rows += _speed_rows("Decode, tok/s", forms, lambda speed: speed.decode, lambda speed: speed.decode_ratio)
        rows.append(
            _row(
                "First token, ms",
                forms,
                lambda form: form.speed.first_token_ms if form.speed else None,
                _milliseconds,
                quantity="Speed",
            )
        )
    return rows


def settings_lines(report: Report) -> list[SettingsLine]:
    """What the numbers of the headline were measured under."""
    lines: list[SettingsLine] = []
    contexts: list[Mapping[str, Setting] | None] = [{"context": f"{form.context} tokens"} for form in report.forms]
    lines += _settings_of("MACs", report.forms, contexts, " · linear layers and attention; 1 MAC is 2 FLOPs")
    measured: list[Perplexity | None] = [form.perplexity for form in report.forms]
    settings = [form.quality[0].settings if form.quality else None for form in report.forms]
    # What is measured otherwise has no perplexity to speak of.
    if any(measured) or not any(settings):
        lines += _settings_of("Perplexity", report.forms, [each.settings if each else None for each in measured])
    if any(settings):
        lines += _settings_of("Quality", report.forms, settings)
    timed: list[Speed | None] = [form.speed for form in report.forms]
    return lines + _settings_of("Speed", report.forms, [each.settings if each else None for each in timed])


def smallest(report: Report) -> int | None:
    """The index of the form to put first in a summary: of those compared with the first, the smallest."""
    others = range(1, len(report.forms))
    return min(others, key=lambda index: report.forms[index].parameters) if others else None


# For each quantity with settings: the digits of its ratio, and what two forms must share to be compared.
_DECIMALS = {"MACs": 3, "Perplexity": 4, "Quality": 4, "Speed": 2}
_CONDITIONS: dict[str, Callable[[Form], object]] = {
    "MACs": lambda form: form.context,
    "Perplexity": lambda form: form.perplexity and form.perplexity.settings,
    "Quality": lambda form: form.quality and form.quality[0].settings,
    "Speed": lambda form: form.speed and form.speed.settings,
}


def _row(
    label: str,
    forms: Sequence[Form],
    value: Callable[[Form], float | None],
    text: Callable[[float], str] = fmt.plain,
    *,
    minor: bool = False,
    quantity: str = "",
) -> Row:
    """A row of numbers of which less is better."""
    reference = value(forms[0])
    cells = []
    for form in forms:
        number = value(form)
        if number is None:
            cells.append(Cell(fmt.MISSING))
            continue
        relative = _ratio(number, reference, form, forms[0], quantity)
        if quantity == "Speed" and form.speed is not None and form.speed.first_token_ratio is not None:
            relative = form.speed.first_token_ratio
        cell = Cell(text(number), value=number)
        cells.append(_compared(cell, None if form is forms[0] else relative, _DECIMALS.get(quantity, 3), less=True))
    return Row(label, tuple(cells), minor, quantity)


def _loss_row(forms: Sequence[Form]) -> Row:
    first = forms[0].perplexity
    cells = []
    for form in forms:
        measured = form.perplexity
        if measured is None:
            cells.append(Cell(fmt.MISSING))
        elif form is not forms[0] and first is not None and measured.settings == first.settings:
            added = measured.nats - first.nats
            if abs(added) < _ROUNDING:
                added = 0.0
            sign = "+" if added > 0 else fmt.MINUS if added < 0 else "±"
            cells.append(Cell(fmt.plain(measured.nats), ratio_text=f"{sign}{fmt.plain(abs(added), 2)}"))
        else:
            cells.append(Cell(fmt.plain(measured.nats)))
    return Row("nats/token", tuple(cells), minor=True, quantity="Perplexity")


def _quality_row(name: str, forms: Sequence[Form]) -> Row:
    """One measure of quality. What only compares with the first form has no entry there, and no ratio to it."""
    measured = [next((entry for entry in form.quality if entry.name == name), None) for form in forms]
    first = measured[0]
    cells = []
    for form, entry in zip(forms, measured, strict=True):
        if entry is None:
            cells.append(Cell(fmt.MISSING))
            continue
        relative = None
        if first is not None and form is not forms[0]:
            relative = _ratio(entry.value, first.value, form, forms[0], "Quality")
        cell = Cell(fmt.plain(entry.value), value=entry.value)
        cells.append(_compared(cell, relative, _DECIMALS["Quality"], less=entry.better == "less"))
    return Row(name, tuple(cells), quantity="Quality")


def _speed_rows(
    label: str, forms: Sequence[Form], rate: Callable[[Speed], Rate], given: Callable[[Speed], float | None]
) -> list[Row]:
    """The medians, of which more is better, and below them the slowest and fastest repeat."""
    first = rate(forms[0].speed) if forms[0].speed else None
    medians, spreads = [], []
    for form in forms:
        if form.speed is None:
            medians.append(Cell(fmt.MISSING))
            spreads.append(Cell(""))
            continue
        here = rate(form.speed)
        relative = given(form.speed)
        if relative is None and first is not None:
            relative = _ratio(here.median, first.median, form, forms[0], "Speed")
        cell = Cell(fmt.plain(here.median), value=here.median, low=here.min, high=here.max)
        cell = _compared(cell, None if form is forms[0] else relative, _DECIMALS["Speed"], less=False)
        # Where the repeats of the two overlap, neither is called better.
        apart = first is None or here.min > first.max or here.max < first.min
        medians.append(cell if apart else replace(cell, tone="even"))
        spreads.append(Cell(f"{fmt.plain(here.min, 3)}{fmt.DASH}{fmt.plain(here.max, 3)}"))
    return [
        Row(label, tuple(medians), quantity="Speed"),
        Row("min to max", tuple(spreads), minor=True, quantity="Speed"),
    ]


def _milliseconds(value: float) -> str:
    return fmt.plain(value, 3)


def _compared(cell: Cell, relative: float | None, decimals: int, *, less: bool) -> Cell:
    """`cell` with its ratio; `less` says that less is better."""
    if relative is None:
        return cell
    tone: Tone = "even"
    if abs(relative - 1) >= _EVEN:
        tone = "better" if (relative < 1) == less else "worse"
    return replace(cell, ratio=relative, ratio_text=fmt.ratio(relative, decimals), tone=tone)


def _ratio(value: float, reference: float | None, form: Form, first: Form, quantity: str) -> float | None:
    condition = _CONDITIONS.get(quantity)
    comparable = condition is None or condition(form) == condition(first)
    return value / reference if reference and comparable else None


def _settings_of(
    quantity: str, forms: Sequence[Form], settings: Sequence[Mapping[str, Setting] | None], more: str = ""
) -> list[SettingsLine]:
    """One line where all forms share their settings, else one for each form."""
    known = [each for each in settings if each is not None]
    if not known:
        return [SettingsLine(quantity, quantity, "not measured")] if forms else []
    if all(each == known[0] for each in known):
        return [SettingsLine(quantity, quantity, fmt.settings(known[0]) + more)]
    return [
        SettingsLine(quantity, f"{quantity}, {form.name}", fmt.settings(each) + more)
        for form, each in zip(forms, settings, strict=True)
        if each is not None
    ]
