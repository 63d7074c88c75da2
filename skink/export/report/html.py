"""The report as one self-contained page: no script, nothing loaded, light and dark, fit for printing."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files

from skink.export.report import formatting as fmt
from skink.export.report.layers import layers_sentence, rejections_by_reason
from skink.export.report.losses import loss_sentence, nats
from skink.export.report.markup import Child, Markup, document, join, tag
from skink.export.report.measures import Form
from skink.export.report.model import Comparison, PassRecord, Report
from skink.export.report.page_plots import comparison_plot, form_plots, layer_plots, pass_plots
from skink.export.report.recovery import recovery_section
from skink.export.report.savings import LINEAR, MODEL, saving_lines, saving_rows
from skink.export.report.summary import Cell, Row, headline, settings_lines, smallest

_VERIFIED = ("no", "structure", "numbers", "every edit")


def page(report: Report) -> str:
    """The text of `report.html`."""
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    body = join(
        _header(report),
        tag(
            "main",
            _headline(report),
            _savings(report),
            _notes(report.notes),
            form_plots(report),
            _comparisons(report.comparisons),
            recovery_section(report),
            _passes(report.passes),
            _layers(report),
            _provenance(report),
        ),
        tag(
            "footer",
            f"Written by Skink {report.skink_version} at {report.created}. The same numbers are in report.json.",
        ),
    )
    return document(title=f"{report.title} · Skink", style=style, body=body)


def _header(report: Report) -> Markup:
    facts = [report.source.name, report.source.model_type, report.dtype, f"seed {report.seed}", report.created]
    return tag(
        "header",
        tag("p", "Skink report", class_="eyebrow"),
        tag("h1", report.title),
        tag("p", " · ".join(fact for fact in facts if fact), class_="facts"),
        tag("p", tag("code", report.recipe.line), class_="recipe") if report.recipe.line else None,
    )


def _section(title: str, *children: Child) -> Markup:
    return tag("section", tag("h2", title), children)


def table(caption: str, heads: Sequence[Child], rows: Iterable[Sequence[Child]], class_: str | None = None) -> Markup:
    """A table whose first column heads its rows."""
    header = tag("thead", tag("tr", (tag("th", head, scope="col") for head in heads)))
    body = tag(
        "tbody", (tag("tr", tag("th", row[0], scope="row"), (tag("td", cell) for cell in row[1:])) for row in rows)
    )
    return tag("div", tag("table", tag("caption", caption), header, body, class_=class_), class_="scroll")


def _headline(report: Report) -> Markup | None:
    if not report.forms:
        return _section("Summary", tag("p", "No model was measured.", class_="missing"))
    rows = headline(report)
    written = settings_lines(report)
    return _section(
        "Summary",
        _tiles(report.forms, rows, smallest(report)),
        _headline_table(report.forms, rows),
        tag("dl", (tag("div", tag("dt", line.label), tag("dd", line.text)) for line in written), class_="settings"),
    )


def _tiles(forms: Sequence[Form], rows: Sequence[Row], index: int | None) -> Markup | None:
    """One form beside the first: every size and speed together, so that none stands for the others."""
    if index is None:
        return None
    tiles = []
    for row in rows:
        cell = row.cells[index]
        if row.minor or cell.ratio is None:
            continue
        tiles.append(
            tag(
                "li",
                tag("span", row.label, class_="name"),
                tag("strong", fmt.change(cell.ratio, 2 if row.quantity == "Perplexity" else 1), class_=cell.tone),
                tag("span", f"{_unbroken(row.cells[0].text)} → {_unbroken(cell.text)}", class_="was"),
            )
        )
    lead = join(tag("b", forms[index].name), " beside ", tag("b", forms[0].name))
    return join(tag("p", lead, class_="lead"), tag("ul", tiles, class_="tiles")) if tiles else None


def _unbroken(text: str) -> str:
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _headline_table(forms: Sequence[Form], rows: Sequence[Row]) -> Markup:
    head = tag("thead", tag("tr", tag("td"), (tag("th", form.name, scope="col") for form in forms)))
    body = (
        tag(
            "tr",
            tag("th", row.label, scope="row"),
            (tag("td", _cell(cell)) for cell in row.cells),
            class_="minor" if row.minor else None,
        )
        for row in rows
    )
    caption = f"Every form of the model. Ratios are to {forms[0].name}; speeds are medians."
    return tag(
        "div", tag("table", tag("caption", caption), head, tag("tbody", body), class_="headline"), class_="scroll"
    )


def _cell(cell: Cell) -> Child:
    if not cell.ratio_text:
        return cell.text
    return join(cell.text, " ", tag("span", cell.ratio_text, class_=f"ratio {cell.tone}"))


def _notes(notes: Sequence[str]) -> Markup | None:
    if not notes:
        return None
    return tag("aside", tag("h2", "Notes"), tag("ul", (tag("li", note) for note in notes)), class_="notes")


def _comparisons(rows: Sequence[Comparison]) -> Markup | None:
    if not rows:
        return None
    cells = [
        (
            row.name,
            f"{row.keep:.3g}",
            fmt.plain(row.perplexity),
            fmt.ratio(row.ratio_to_dense, 4),
            fmt.settings(row.settings),
        )
        for row in rows
    ]
    shared = all(row.settings == rows[0].settings for row in rows)
    heads: list[Child] = ["Method", "Keep", "Perplexity", "Ratio to dense", "Measured on"]
    if shared:
        heads, cells = heads[:-1], [row[:-1] for row in cells]  # type: ignore[misc]
    caption = "Methods at an equal share of parameters kept."
    if shared:
        caption += f" Measured on: {fmt.settings(rows[0].settings)}."
    return _section(
        "Methods compared", tag("div", table(caption, heads, cells), comparison_plot(rows), class_="halves")
    )


def _passes(passes: Sequence[PassRecord]) -> Markup | None:
    if not passes:
        return None
    cells = [
        (
            join(
                tag("code", record.name),
                tag("code", f"{{{record.options}}}", class_="options") if record.options else None,
            ),
            fmt.seconds(record.seconds),
            f"{record.edits:,}",
            f"{record.skipped:,}",
            _number(record.error),
            _number(record.kl),
            _VERIFIED[record.verified],
        )
        for record in passes
    ]
    caption = (
        "In the order they ran. Error: relative L2 error of the logits against the captured model after the pass. "
        "KL: divergence of the next-token distribution from the captured model's, nats per token."
    )
    heads = ("Pass", "Time", "Edits", "Skipped", "Error", "KL", "Verified")
    notes = [tag("li", f"{record.name}: {note}") for record in passes for note in record.notes]
    return _section(
        "Passes",
        table(caption, heads, cells, "passes"),
        tag("ul", notes) if notes else None,
        pass_plots(passes),
        _rejections(passes),
    )


def _rejections(passes: Sequence[PassRecord]) -> Markup | None:
    rows = [
        (record.name, reason, str(len(places)), tag("span", ", ".join(places), class_="name"))
        for record in passes
        for reason, places in rejections_by_reason(record)
    ]
    if not rows:
        return None
    named = sum(len(record.rejections) for record in passes)
    content = table("What a pass left alone, and why.", ("Pass", "Reason", "Places", "Where"), rows, "rejections")
    return _details(f"{named:,} {'place' if named == 1 else 'places'} left alone", content)


def _savings(report: Report) -> Markup | None:
    rows = [(row.label, _cell(row.linear), _cell(row.model)) for row in saving_rows(report)]
    if not rows:
        return None
    caption = " ".join(saving_lines(report))
    return _section("What was saved", table(caption, ("Counted or measured", LINEAR, MODEL), rows))


def _layers(report: Report) -> Markup | None:
    layers = report.layers
    if not layers:
        return None
    with_loss = any(layer.predicted_loss is not None or layer.measured_loss is not None for layer in layers)
    several_kinds = len({layer.kind for layer in layers}) > 1
    cells = [
        (
            tag("span", layer.name, class_="name"),
            *((layer.kind,) if several_kinds else ()),
            f" {fmt.TIMES} ".join(map(str, layer.shape)),
            layer.decision,
            fmt.MISSING if layer.rank is None else str(layer.rank),
            f"{layer.parameters_before:,}",
            f"{layer.parameters_after:,}",
            _number(layer.predicted_error),
            _number(layer.baseline_error),
            _number(layer.weight_error),
            *((nats(layer.predicted_loss), nats(layer.measured_loss)) if with_loss else ()),
            layer.reason,
        )
        for layer in layers
    ]
    caption = (
        "Predicted and plain SVD: relative error of the layer's output, from the energy discarded, at the same rank. "
        "Weight: relative Frobenius error of the weight itself."
    )
    if with_loss:
        caption += f" Loss: {report.loss_unit}, that the edit should add, and that it alone added on held-out text."
    errors = ("Predicted", "Plain SVD", "Weight", *(("Loss, predicted", "measured") if with_loss else ()))
    kind = ("Kind",) if several_kinds else ()
    shape = f"Out {fmt.TIMES} in"
    heads = ("Layer", *kind, shape, "Decision", "Rank", "Parameters before", "After", *errors, "Reason")
    count = f"All {len(layers):,} layers" if len(layers) > 1 else "The one layer"
    return _section(
        "Layers",
        tag("p", layers_sentence(layers)),
        tag("p", sentence) if (sentence := loss_sentence(report)) else None,
        layer_plots(layers),
        _details(count, table(caption, heads, cells, "layers")),
    )


def _provenance(report: Report) -> Markup:
    calibration = report.calibration
    data = {} if calibration is None else {
        "data": calibration.source,
        "sha256": calibration.sha256,
        "windows": f"{calibration.windows:,} of {calibration.window_length:,} tokens",
        "seed": str(calibration.seed),
    }  # fmt: skip
    cards = [
        _facts("Calibration", data, "No calibration data was used."),
        _facts("Machine", report.machine, "Not recorded."),
        _facts("Versions", {"skink": report.skink_version, **report.versions}, ""),
    ]
    recipe = tag("div", tag("h3", "Resolved recipe"), tag("pre", tag("code", report.recipe.yaml)), class_="card wide")
    return _section("How this was made", tag("div", cards, recipe if report.recipe.yaml else None, class_="cards"))


def _facts(title: str, facts: Mapping[str, str], otherwise: str) -> Markup:
    content = (
        tag("dl", (tag("div", tag("dt", name), tag("dd", text)) for name, text in facts.items()))
        if facts
        else tag("p", otherwise, class_="missing")
    )
    return tag("div", tag("h3", title), content, class_="card")


def _details(summary: str, content: Child) -> Markup:
    return tag("details", tag("summary", summary), content)


def _number(value: float | None) -> str:
    return fmt.MISSING if value is None else fmt.plain(value, 3)
