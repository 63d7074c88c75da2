"""What training won back: its rows, its curves, and the section of the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from skink.export.report import formatting as fmt
from skink.export.report.curves import Line, curves
from skink.export.report.markup import Markup, join, tag
from skink.export.report.model import Recovery, Report

HEADS = ("trained", "tokens", "time", "tokens/s", "held-out loss")
CAPTION = (
    "In the order they ran. Losses are means over tokens. Held-out text is never trained on; the loss on it is the "
    "cross-entropy where that is a term, and else the loss itself. The weights that stayed are those with the least."
)


@dataclass(frozen=True)
class RecoveryRow:
    """One training as the reader sees it: the pass, its cells as in `HEADS`, and remarks."""

    name: str
    cells: tuple[str, ...]
    remarks: tuple[str, ...]


def recovery_rows(report: Report) -> list[RecoveryRow]:
    """A row for each pass that trained."""
    return [RecoveryRow(entry.name, _cells(entry), _remarks(entry)) for entry in report.recoveries]


def recovery_section(report: Report) -> Markup | None:
    """The section of the page; None where nothing trained."""
    if not report.recoveries:
        return None
    parts = [_part(index, row, entry) for index, (row, entry) in enumerate(_paired(report))]
    return tag("section", tag("h2", "Recovery"), tag("p", CAPTION), parts)


def _paired(report: Report) -> Sequence[tuple[RecoveryRow, Recovery]]:
    return list(zip(recovery_rows(report), report.recoveries, strict=True))


def _part(index: int, row: RecoveryRow, entry: Recovery) -> Markup:
    facts = [
        *zip(HEADS, row.cells, strict=True),
        ("loss", _terms(entry)),
        ("text", f"{entry.text} {entry.sha256[:12]}"),
    ]
    listed = tag("dl", (tag("div", tag("dt", name), tag("dd", said)) for name, said in facts), class_="settings")
    remarks = tag("ul", (tag("li", remark) for remark in row.remarks)) if row.remarks else None
    settings = tag("details", tag("summary", "All settings"), tag("p", fmt.settings(entry.settings)))
    return join(
        tag("h3", tag("code", row.name)),
        tag("div", tag("div", listed, remarks, settings), _plots(index, entry), class_="halves"),
    )


def _plots(index: int, entry: Recovery) -> Markup:
    found = []
    for ident, title, line in (
        (f"training-{index}", "Training loss", Line("training", entry.losses, "theirs")),
        (f"held-out-{index}", "Held-out loss", Line("held-out", entry.held_out, "ours", dots=True)),
    ):
        spoken = f"{line.name}: {_end(line, 0)} at first, {_end(line, -1)} at last" if line.points else "not measured"
        drawing = curves(ident, title, spoken, [line], "tokens read")
        if drawing is not None:
            found.append(tag("figure", tag("h3", title), drawing))
    return tag("div", found)


def _end(line: Line, index: int) -> str:
    return fmt.plain(line.points[index][1])


def _cells(entry: Recovery) -> tuple[str, ...]:
    held = fmt.MISSING
    if entry.before is not None and entry.after is not None:
        held = f"{fmt.plain(entry.before)} → {fmt.plain(entry.after)}"
    rate = f"{entry.tokens / entry.seconds:,.0f}" if entry.seconds > 0 else fmt.MISSING
    return fmt.count(entry.trained), fmt.count(entry.tokens), fmt.seconds(entry.seconds), rate, held


def _terms(entry: Recovery) -> str:
    return " + ".join(name if weight == 1 else f"{fmt.plain(weight)} {name}" for name, weight in entry.loss.items())


def _remarks(entry: Recovery) -> tuple[str, ...]:
    said = []
    if entry.stopped_early:
        said.append("It stopped early: the held-out loss no longer fell.")
    if entry.resumed_at is not None:
        said.append(f"It went on from a checkpoint after {entry.resumed_at:,} of {entry.steps:,} steps.")
    if entry.processes > 1:
        said.append(f"{entry.processes} processes trained together.")
    return (*said, *entry.notes)
