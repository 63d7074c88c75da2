"""`skink bisect`: the first rewrite that breaks a model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from skink.cli.arguments import AsJson, parse_overrides
from skink.cli.console import Session, session_of
from skink.cli.repro import WITHOUT_WEIGHTS, WeightsOf, folder_at_fault, read_folder

if TYPE_CHECKING:
    from torch import Tensor

    from skink.cli.models import Loaded
    from skink.graph.bisect import BisectResult
    from skink.graph.failure import Failure
    from skink.graph.pipeline import Pipeline
    from skink.graph.program import Program
    from skink.graph.windows import Windows


def bisect(
    context: typer.Context,
    subject: Annotated[
        str, typer.Argument(metavar="DIR|MODEL", help="The folder that a failure left; or a model, with --recipe.")
    ],
    recipe: Annotated[
        str | None,
        typer.Option(help="For a model: what is run on it, as in skink compress.", metavar="R", show_default=False),
    ] = None,
    error_above: Annotated[
        float | None,
        typer.Option(
            "--error-above",
            help="Find the rewrite that lifts the relative error of the model's results above X.",
            metavar="X",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PASS.OPTION=VALUE...", help="Change options of the recipe: low-rank.keep=0.7."),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            metavar="FILES...",
            help="For a model: text to calibrate on: files, folders, or the word stdlib.",
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of calibration text.", metavar="N")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.", metavar="N")] = 128,
    model: WeightsOf = None,
    seed: Annotated[int, typer.Option(help="For a model: of everything random.", metavar="N")] = 0,
    lines: Annotated[
        int, typer.Option(min=0, help="Lines of the program to show around what changed.", metavar="N")
    ] = 3,
    as_json: AsJson = False,
) -> None:
    """Find the first rewrite that makes a pipeline fail, or that lifts the error above X, and show it.

    DIR is the folder that a failure left. For a MODEL and a recipe, every pass is verified as when it is compressed.
    """
    session = session_of(context)
    from skink.graph.reproducer import FILE

    if (Path(subject) / FILE).is_file():
        _bisect_folder(session, Path(subject), error_above, lines, model)
        return
    if recipe is None:
        raise typer.BadParameter(
            f"{subject!r} holds no {FILE}: it is no folder that a failure left, and a model needs --recipe.",
            param_hint="'DIR|MODEL'",
        )
    from skink.graph.pipeline import Pipeline
    from skink.passes.canonicalize import Canonicalize
    from skink.passes.recipe import load_recipe

    passes = load_recipe(recipe, parse_overrides(overrides or [])).passes
    if any(entry.training_tokens(length) for entry in passes):
        session.note("Passes that train are left out: they rewrite nothing.")
        passes = tuple(entry for entry in passes if not entry.training_tokens(length))
    pipeline = Pipeline((Canonicalize(), *passes))
    needs_text = any(entry.needs_calibration for entry in passes)
    from skink.cli.quiet import quiet_transformers

    with quiet_transformers():
        program, tokens = _subject(subject, calibration, windows, length, needs_text=needs_text)
        _search(session, program, pipeline, lines, calibration=tokens, seed=seed, error_above=error_above)


def _bisect_folder(session: Session, folder: Path, error_above: float | None, lines: int, model: str | None) -> None:
    found, pipeline = read_folder(folder, model)
    at = found.circumstances
    wanted = found.failure if error_above is None else None
    if not found.weights:
        session.note(WITHOUT_WEIGHTS)
    with folder_at_fault(folder):
        _search(
            session,
            found.start,
            pipeline,
            lines,
            calibration=at.calibration,
            padding=at.padding,
            training=at.training,
            held_out=at.held_out,
            seed=at.seed,
            verify=at.verify,
            error_above=error_above,
            failure=wanted,
        )


def _subject(
    name: str, text: Sequence[str] | None, windows: int, length: int, *, needs_text: bool
) -> "tuple[Program, Tensor | None]":
    """The model's program, and token windows where they are asked for."""
    from skink.cli.models import load_model
    from skink.compression.compress import captured
    from skink.export.huggingface.loading import STDLIB_LLAMA

    loaded = load_model(name)
    program = captured(loaded.model)
    if text is None and needs_text and name == STDLIB_LLAMA:
        text = ["stdlib"]
    if not text or not needs_text:
        return program, None
    return program, _windows(name, loaded, text, windows, length)


def _windows(name: str, loaded: "Loaded", text: Sequence[str], windows: int, length: int) -> "Tensor | None":
    from skink.cli.models import tokenizer_of
    from skink.compression.text_options import TextOptions
    from skink.compression.texts import calibration_and_held_out

    options = TextOptions(calibration_windows=windows, length=length)
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    found, _ = calibration_and_held_out(tokenizer_of(name, loaded), text, None, options, longest=longest)
    return found.tokens if found is not None else None


def _search(
    session: Session,
    program: "Program",
    pipeline: "Pipeline",
    lines: int,
    *,
    calibration: "Tensor | None",
    padding: "Tensor | None" = None,
    training: "Windows | None" = None,
    held_out: "Windows | None" = None,
    seed: int,
    verify: int = 2,
    error_above: float | None,
    failure: "Failure | None" = None,
) -> None:
    from skink.cli.progress import PhaseProgress
    from skink.graph.bisect import bisect as search

    with PhaseProgress(session) as progress:
        progress("bisect", 0, 2)
        found = search(
            program,
            pipeline,
            calibration=calibration,
            padding=padding,
            training=training,
            held_out=held_out,
            seed=seed,
            verify=verify,
            error_above=error_above,
            failure=failure,
            progress=lambda done, total: progress("bisect", done, total),
        )
    if session.as_json:
        session.emit(_content(found, lines))
    else:
        _show(session, found, lines)


def _content(found: "BisectResult", lines: int) -> dict[str, Any]:
    return {
        "edit": dataclasses.asdict(found.edit) if found.edit is not None else None,
        "pass": found.pass_name,
        "failure": found.failure,
        "edits": found.edits,
        "runs": found.runs,
        "failed_otherwise": found.otherwise,
        "error_before": found.error_before,
        "error_after": found.error_after,
        "diff": found.diff(lines),
    }


def _show(session: Session, found: "BisectResult", lines: int) -> None:
    edit = found.edit
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    if edit is not None:
        title = (
            f"The first rewrite that breaks it: edit {edit.index} (of {found.first} to {found.first + found.edits - 1})"
        )
        rows = {
            "pass": edit.pass_name,
            "rule": edit.rule,
            "node": f"%{edit.node}",
            "module": edit.qualified_name,
            "source": edit.source,
            "detail": edit.detail,
        }
    else:
        title = f"No rewrite breaks it: pass {found.pass_name} fails by itself, after {found.edits} edits"
        rows = {"pass": found.pass_name}
    rows |= {
        "failure": found.failure,
        "error": f"{_number(found.error_before)} before, {_number(found.error_after)} after",
        "runs": f"{found.runs}"
        + (f", of which {found.otherwise} failed in another way and counted as fine" if found.otherwise else ""),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    session.show(Text(title, style="bold"), table, "")
    session.show(_coloured(found.diff(lines)))


def _number(error: float | None) -> str:
    return "no results" if error is None else f"{error:.2e}"


def _coloured(diff: str) -> Text:
    text = Text()
    for line in diff.splitlines():
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
        text.append(line + "\n", style=style if not line.startswith(("+++", "---")) else "dim")
    return text
