"""`skink export`: a model for ONNX Runtime."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from skink.cli.arguments import AsJson, Overwrite
from skink.cli.console import Session, session_of
from skink.errors import OutputError

if TYPE_CHECKING:
    from skink.export.onnx import OnnxReport


def export(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder made by Skink, or any MODEL, which is exported as it is.")
    ],
    onnx: Annotated[Path, typer.Option("--onnx", help="The folder to make.", metavar="OUT")],
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare logits and greedy tokens with PyTorch's.")
    ] = True,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write DIR as ONNX with its state, and check it against PyTorch in a fresh process."""
    session = session_of(context)
    refuse_existing(onnx, overwrite)
    from skink.cli.quiet import quiet_transformers

    with quiet_transformers():
        from skink.cli.models import is_onnx, load_model
        from skink.cli.progress import PhaseProgress
        from skink.export.huggingface.loading import holds_encoder
        from skink.export.onnx import export_onnx

        with PhaseProgress(session) as progress:
            progress("load", 0, 1)
            # A folder that is ONNX already is refused by load_model, in its own words.
            encoder = not is_onnx(model) and holds_encoder(model)
            loaded = load_model(model, encoders=encoder)
            progress("load", 1, 1)
            progress("onnx", 0, 1)
            report = export_onnx(
                loaded.model,
                onnx,
                tokenizer=loaded.tokenizer,
                check=check,
                overwrite=overwrite,
                progress=lambda done, total: progress("onnx", done, total),
            )
    if session.as_json:
        session.emit(report.as_json())
    else:
        _show(session, report)


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that exists before anything is loaded.

    Raises:
        OutputError: OUTPUT-001.
    """
    if out.exists() and not (overwrite and out.is_dir()):
        fix = "choose another, or give --overwrite." if out.is_dir() else "choose another name: this is a file."
        raise OutputError("OUTPUT-001", f"{str(out)!r} exists already.", fix=fix)


def _show(session: Session, report: "OnnxReport") -> None:
    from skink.export.report.formatting import size

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row("graph", f"{report.nodes} nodes, opset {report.opset}, {report.dtype}")
    table.add_row("size", size(sum(report.bytes.values())))
    table.add_row("checked", _check_text(report))
    for note in report.notes:
        table.add_row("note", Text(note))
    session.show(Text(str(report.folder), style="bold"), table, "")
    if any(name.startswith("past_key_values.") for name in report.interface["inputs"]):
        session.show(f"  skink generate {report.folder} 'def main():'    # in ONNX Runtime")


def _check_text(report: "OnnxReport") -> Text:
    if report.check is None:
        return Text("no")
    greedy = f"{report.check.tokens} greedy tokens and all logits" if report.check.tokens else "all results"
    return Text(f"{greedy}, against PyTorch, in a fresh process")
