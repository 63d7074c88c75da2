"""The report in the terminal: the headline table, the passes, the layers in a sentence, and the notes.

Text of the report goes in as `Text`, never as markup: a name such as `h[0]` is printed as it is.
"""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from skink.export.report import formatting as fmt
from skink.export.report.layers import layers_sentence, rejections_by_reason
from skink.export.report.losses import loss_sentence
from skink.export.report.model import Comparison, PassRecord, Report
from skink.export.report.recovery import HEADS, recovery_rows
from skink.export.report.savings import LINEAR, MODEL, saving_lines, saving_rows
from skink.export.report.summary import Row, headline, settings_lines

_TONES = {"better": "green", "worse": "red", "even": "dim"}
_VERIFIED = ("no", "structure", "numbers", "every edit")
_REASONS_SHOWN = 3


def render(report: Report) -> Group:
    """What to give to a rich console; reads well from 80 columns on."""
    parts: list[RenderableType] = [_title(report)]
    if report.forms:
        parts += [_headline(report), _definitions([(line.label, line.text) for line in settings_lines(report)])]
    if report.savings:
        parts += [Text(), _savings(report), *(Text(fmt.clean(line), style="dim") for line in saving_lines(report))]
    if report.comparisons:
        parts += [Text(), *_comparisons(report.comparisons)]
    if report.recoveries:
        parts += [Text(), *_recoveries(report)]
    if report.passes:
        parts += [Text(), _passes(report.passes), *_remarks(report.passes)]
    if report.layers:
        sentences = (layers_sentence(report.layers), loss_sentence(report))
        parts += [Text(), *(Text(fmt.clean(sentence)) for sentence in sentences if sentence)]
    if report.notes:
        parts += [Text(), *(_bullet(note) for note in report.notes)]
    return Group(*parts)


def _title(report: Report) -> Text:
    title = Text(fmt.clean(report.title), style="bold")
    title.append(
        fmt.clean(f"\n{report.source.name} ({report.source.model_type}, {report.dtype})\n{report.recipe.line}"),
        style="not bold dim",
    )
    return title


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 1, 0, 0))


def _headline(report: Report) -> Table:
    table = _table()
    table.add_column("", no_wrap=True)
    for form in report.forms:
        table.add_column(Text(fmt.clean(form.name)), justify="right", overflow="fold")
    # From four forms on, 80 columns hold a number or its ratio, not both.
    gap = " " if len(report.forms) <= 3 else "\n"
    for row in headline(report):
        table.add_row(*_cells(row, gap))
    return table


def _savings(report: Report) -> Table:
    table = _table()
    table.add_column(Text("What was saved", style="bold"), no_wrap=True)
    for label in (LINEAR, MODEL):
        table.add_column(label, justify="right", overflow="fold")
    for row in saving_rows(report):
        cells = []
        for cell in (row.linear, row.model):
            cells.append(Text(f"{cell.text} " if cell.ratio_text else cell.text))
            cells[-1].append(cell.ratio_text, style=_TONES[cell.tone])
        table.add_row(row.label, *cells)
    return table


def _cells(row: Row, gap: str) -> list[Text]:
    style = "dim" if row.minor else ""
    cells = [Text(f"  {row.label}" if row.minor else row.label, style=style, no_wrap=True)]
    for cell in row.cells:
        text = Text(cell.text, style=style)
        if cell.ratio_text:
            text.append(gap + cell.ratio_text, style="" if row.minor else _TONES[cell.tone])
        cells.append(text)
    return cells


def _comparisons(comparisons: Sequence[Comparison]) -> list[RenderableType]:
    table = _table()
    table.add_column("Method", overflow="fold")
    for label in ("keep", "perplexity", "to dense"):
        table.add_column(label, justify="right")
    for row in comparisons:
        table.add_row(
            Text(fmt.clean(row.name)),
            Text(f"{row.keep:.3g}"),
            Text(fmt.plain(row.perplexity)),
            Text(fmt.ratio(row.ratio_to_dense, 4)),
        )
    shared = all(row.settings == comparisons[0].settings for row in comparisons)
    named = [("Perplexity" if shared else row.name, fmt.settings(row.settings)) for row in comparisons]
    return [table, _definitions(named[:1] if shared else named)]


def _recoveries(report: Report) -> list[RenderableType]:
    table = _table()
    table.add_column("Recovery", overflow="fold")
    for label in HEADS:
        table.add_column(label, justify="right", no_wrap=label != HEADS[-1])
    rows = recovery_rows(report)
    for row in rows:
        table.add_row(*(Text(fmt.clean(cell)) for cell in (row.name, *row.cells)))
    return [table, *(_bullet(remark, style="dim") for row in rows for remark in row.remarks)]


def _passes(passes: Sequence[PassRecord]) -> Table:
    with_kl = any(record.kl is not None for record in passes)
    table = _table()
    table.add_column("Pass", overflow="fold")
    for label in ("time", "edits", "skipped", "error", *(("KL, nats",) if with_kl else ()), "verified"):
        table.add_column(label, justify="left" if label == "verified" else "right", no_wrap=True)
    for record in passes:
        cells = [fmt.seconds(record.seconds), f"{record.edits:,}", f"{record.skipped:,}", _number(record.error)]
        cells += [_number(record.kl)] if with_kl else []
        table.add_row(*(Text(cell) for cell in (fmt.clean(record.name), *cells, _VERIFIED[record.verified])))
    return table


def _number(value: float | None) -> str:
    return fmt.MISSING if value is None else fmt.plain(value, 3)


def _remarks(passes: Sequence[PassRecord]) -> list[RenderableType]:
    """What each pass left alone, and what else it has to say."""
    lines: list[RenderableType] = []
    for record in passes:
        reasons = rejections_by_reason(record)
        for reason, places in reasons[:_REASONS_SHOWN]:
            where = places[0] if len(places) == 1 else f"{len(places)} places, first {places[0]}"
            lines.append(_bullet(f"{record.name} left {where}: {reason}", style="dim"))
        if len(reasons) > _REASONS_SHOWN:
            lines.append(_bullet(f"{record.name}: {len(reasons) - _REASONS_SHOWN} more reasons in the report", "dim"))
        lines += [_bullet(f"{record.name}: {note}", style="dim") for note in record.notes]
    return lines


def _definitions(lines: Sequence[tuple[str, str]]) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(overflow="fold", max_width=28)
    grid.add_column(overflow="fold")
    for name, text in lines:
        grid.add_row(Text(fmt.clean(name), style="dim"), Text(fmt.clean(text), style="dim"))
    return grid


def _bullet(text: str, style: str = "") -> RenderableType:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_row(Text("•", style=style), Text(fmt.clean(text), style=style, overflow="fold"))
    return Padding(grid, (0, 0, 0, 0))
