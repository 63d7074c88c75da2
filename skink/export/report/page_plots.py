"""Which plots the page shows of which part of the report. The drawing is in `plots`."""

import math
from collections.abc import Sequence

from skink.export.report import formatting as fmt
from skink.export.report.layers import KEPT, Role, roles
from skink.export.report.markup import Child, Markup, join, tag
from skink.export.report.model import Comparison, LayerRecord, PassRecord, Report
from skink.export.report.plots import Bar, Column, bars, columns, largest
from skink.export.report.summary import headline, settings_lines

# The colour of what Skink made, in plots that do not compare forms.
_OURS = 2
_UNPLOTTED = frozenset({"First token, ms"})


def form_plots(report: Report) -> Markup | None:
    """Size, perplexity and speed of each form, one plot for each quantity."""
    if not report.forms:
        return None
    lines = settings_lines(report)
    plots: list[Markup] = []
    for row in headline(report):
        if row.minor or row.label in _UNPLOTTED:
            continue
        drawn = [
            Bar(form.name, cell.value, cell.text, cell.ratio_text, cell.low, cell.high, series)
            for series, (form, cell) in enumerate(zip(report.forms, row.cells, strict=True))
        ]
        under = "; ".join(
            line.text if line.label == line.quantity else f"{line.label}: {line.text}"
            for line in lines
            if line.quantity == row.quantity
        )
        under += " · whiskers from the slowest to the fastest repeat" if row.quantity == "Speed" else ""
        ident = f"form-{len(plots)}"
        plots.append(_figure(row.label, bars(ident, row.label, _spoken(drawn), drawn), under))
    return tag("section", tag("h2", "Size, quality, speed"), tag("div", plots, class_="plots"))


def comparison_plot(rows: Sequence[Comparison]) -> Markup:
    """The loss that each method adds to the dense model's."""
    drawn = []
    for row in rows:
        added = math.log(row.ratio_to_dense) if row.ratio_to_dense > 0 else math.nan
        sign = "+" if added >= 0 else ""
        drawn.append(Bar(row.name, added, f"{sign}{fmt.plain(added, 3)}", series=_OURS))
    title = "Loss added, nats per token"
    return _figure(title, bars("methods", title, _spoken(drawn), drawn), "The logarithm of the ratio to dense.")


def pass_plots(passes: Sequence[PassRecord]) -> Markup:
    """Time and error of each pass."""
    timed = [Bar(record.name, record.seconds, fmt.seconds(record.seconds), series=_OURS) for record in passes]
    plots = [_figure("Time of each pass", bars("pass-time", "Time of each pass", _spoken(timed), timed))]
    if any(record.error is not None for record in passes):
        title = "Error after each pass"
        wrong = [
            Bar(
                record.name,
                record.error,
                "not measured" if record.error is None else fmt.plain(record.error, 3),
                series=_OURS,
            )
            for record in passes
        ]
        plots.append(_figure(title, bars("pass-error", title, _spoken(wrong), wrong)))
    return tag("div", plots, class_="halves")


def layer_plots(layers: Sequence[LayerRecord]) -> Markup:
    """For each role, the error of its layers beside plain SVD's, and their ranks, all on two common scales."""
    pairs = [(role, _errors(role), _ranks(role)) for role in roles(layers)]
    top_error = max((largest(errors) for _, errors, _ in pairs), default=0.0)
    top_rank = max((largest(ranks) for _, _, ranks in pairs), default=0.0)
    with_errors = top_error > 0
    rows = []
    for index, (role, errors, ranks) in enumerate(pairs):
        plots: list[Child] = []
        if with_errors:
            title = f"Relative output error, {role.name}"
            plots.append(columns(f"error-{index}", title, _range(errors), errors, top=top_error))
        title = f"Rank, {role.name}"
        plots.append(columns(f"rank-{index}", title, _range(ranks), ranks, top=top_rank))
        rows.append(
            tag(
                "div", tag("h3", tag("span", role.name, class_="name")), tag("div", plots, class_="pair"), class_="role"
            )
        )
    return join(_legend(layers, with_errors), tag("div", rows, class_="roles"))


def _legend(layers: Sequence[LayerRecord], with_errors: bool) -> Markup:
    key: list[Child] = [
        tag("b", "Left: relative output error, predicted. Right: rank. ") if with_errors else tag("b", "Rank. "),
        tag("span", tag("i", class_="ours"), "this recipe"),
    ]
    if with_errors and any(layer.baseline_error is not None for layer in layers):
        key.append(tag("span", tag("i", class_="theirs"), "plain SVD at the same rank"))
    if any(layer.decision == KEPT for layer in layers):
        key.append(tag("span", tag("i", class_="ours alone"), "kept dense, at full rank"))
    key.append("Across: the number of the block.")
    return tag("p", key, class_="legend")


def _errors(role: Role) -> list[Column]:
    places = []
    for label, layer in role.layers:
        dense = layer.decision == KEPT
        name = f"{layer.name}: {'kept dense' if dense else f'error {_number(layer.predicted_error)}'}"
        if layer.baseline_error is not None:
            name += f", plain SVD {_number(layer.baseline_error)}"
        # The error of a layer kept dense is that of a choice not made.
        values = (None, None) if dense else (layer.predicted_error, layer.baseline_error)
        places.append(Column(label, name, *values, left_alone=dense))
    return places


def _ranks(role: Role) -> list[Column]:
    places = []
    for label, layer in role.layers:
        full = min(layer.shape)
        dense = layer.decision == KEPT or layer.rank is None
        name = f"{layer.name}: {'kept dense' if dense else f'rank {layer.rank}'} of {full}"
        places.append(Column(label, name, full if dense else layer.rank, left_alone=dense))
    return places


def _figure(title: str, drawing: Markup, under: str = "") -> Markup:
    # The title goes above and the small print below, so that the bars of neighbouring plots stand level.
    return tag("figure", tag("h3", title), drawing, tag("figcaption", under) if under else None)


def _spoken(rows: Sequence[Bar]) -> str:
    """The plot in words, for those who cannot see it."""
    return "; ".join(f"{row.label}: {row.text} {row.note}".rstrip() for row in rows)


def _range(places: Sequence[Column]) -> str:
    values = [place.value for place in places if place.value is not None and not place.left_alone]
    kept = sum(place.left_alone for place in places)
    text = (
        f"{len(values)} layers from {fmt.plain(min(values), 3)} to {fmt.plain(max(values), 3)}"
        if values
        else "no values"
    )
    return f"{text}; {kept} kept dense" if kept else text


def _number(value: float | None) -> str:
    return "not known" if value is None else fmt.plain(value, 3)
