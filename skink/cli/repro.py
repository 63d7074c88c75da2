"""`skink repro`: a failure again, from the folder that it left."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from skink.cli.arguments import AsJson
from skink.cli.console import Session, session_of
from skink.errors import RecipeError, ReproducerError, SkinkError

if TYPE_CHECKING:
    from torch import Tensor

    from skink.graph.pipeline import Attempt, Pipeline
    from skink.graph.reproducer import Reproducer

WeightsOf = Annotated[
    str | None,
    typer.Option(
        "--weights-of",
        metavar="MODEL",
        help="For a folder without weights: the model that they are read from.",
        show_default=False,
    ),
]

WITHOUT_WEIGHTS = (
    "The folder holds no weights: structure and shapes are checked, and numbers are not; --weights-of MODEL adds them."
)

# Exit status where the failure did not happen again.
NOT_AGAIN = 3


def repro(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that the failure left.")],
    local: Annotated[bool, typer.Option("--local", help="Start just before the pass that failed.")] = False,
    model: WeightsOf = None,
    as_json: AsJson = False,
) -> None:
    """Run a pipeline that failed again, from the folder DIR that the failure left, and say whether it fails in the
    same way.

    The exit status is 0 where it does, and 3 where it does not.
    """
    session = session_of(context)
    from skink.cli.progress import PhaseProgress
    from skink.graph.program import Stage

    found, pipeline = read_folder(folder, model)
    at = found.circumstances
    program = found.start
    if local:
        pipeline, program = from_failing_pass(found, pipeline), found.before
    with PhaseProgress(session) as progress, folder_at_fault(folder):
        done = pipeline.attempt(
            program,
            calibration=at.calibration,
            padding=at.padding,
            training=at.training,
            held_out=at.held_out,
            original=found.start if local and found.start.stage >= Stage.CANONICAL else None,
            seed=at.seed,
            verify=at.verify,
            limit=at.limit,
            progress=progress,
        )
    same = found.failure.same(done.failure)
    _say(session, found, done, same=same, local=local)
    if not same:
        raise typer.Exit(NOT_AGAIN)


def read_folder(folder: Path, model: str | None = None) -> "tuple[Reproducer, Pipeline]":
    """What a folder holds, and the pipeline that failed.

    Args:
        folder: where it is.
        model: whose weights to use where the folder has none.

    Raises:
        ReproducerError: REPRO-001 where it cannot be read, or where its passes are not here.
        ModelError: MODEL-001 ... -003, for the model.
    """
    from skink.graph.pipeline import Pipeline
    from skink.graph.reproducer import read_reproducer
    from skink.passes.recipe import parse_passes

    found = read_reproducer(folder, _weights(model) if model is not None else None)
    at = found.circumstances
    try:
        passes = parse_passes(at.pipeline)
        pipeline = Pipeline(passes, start=at.start)
    except SkinkError as error:
        packages = ", ".join(name for name in at.packages if name not in ("python", "platform"))
        raise ReproducerError(
            "REPRO-001",
            f"the pipeline of {str(folder)!r} cannot be made here.",
            where=at.pipeline,
            why=f"{error.what} {error.fix}".strip(),
            fix=f"install what it needs, in the versions of versions.json: {packages}."
            if isinstance(error, RecipeError)
            else "install the version of Skink that versions.json names.",
        ) from error
    if not 0 <= at.index < len(passes) or passes[at.index].name != found.failure.pass_name:
        raise ReproducerError(
            "REPRO-001",
            f"{str(folder)!r} says that pass number {at.index} of its pipeline failed, {found.failure.pass_name!r}.",
            where=at.pipeline,
            why="there is no such pass at that place.",
            fix="give the folder as the failure left it.",
        )
    return found, pipeline


def _weights(model: str) -> "dict[str, Tensor]":
    """A model's weights under the names that programs have for them."""
    from skink.cli.quiet import quiet_transformers

    with quiet_transformers():
        from skink.cli.models import load_model
        from skink.compression.compress import captured

        return dict(captured(load_model(model, encoders=True).model).weights())


@contextlib.contextmanager
def folder_at_fault(folder: Path) -> Iterator[None]:
    """What is raised before any pass runs is the fault of the program in the folder.

    Raises:
        ReproducerError: REPRO-001.
    """
    try:
        yield
    except SkinkError:
        raise
    except Exception as error:
        raise ReproducerError(
            "REPRO-001",
            f"the program in {str(folder)!r} does not run.",
            why=f"{type(error).__name__}: {str(error).strip()}".splitlines()[0],
            fix="give the folder as the failure left it.",
        ) from error


def from_failing_pass(found: "Reproducer", pipeline: "Pipeline") -> "Pipeline":
    """The pass that failed and those after it."""
    from skink.graph.pipeline import Pipeline

    return Pipeline(pipeline.passes[found.circumstances.index :], start=found.before.stage)


def compared_versions(found: "Reproducer") -> dict[str, dict[str, str]]:
    """Versions where it failed and here, by package."""
    from skink.graph.versions import versions

    here = versions(found.circumstances.packages)
    return {name: {"there": there, "here": here.get(name, "unknown")} for name, there in found.versions.items()}


def show_versions(session: Session, compared: dict[str, dict[str, str]]) -> None:
    """A table of versions, with those that differ marked."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("version of", "there", "here", ""):
        table.add_column(column)
    for name, entry in compared.items():
        mark = "" if entry["there"] == entry["here"] else "differs"
        table.add_row(Text(name), Text(entry["there"]), Text(entry["here"]), Text(mark, style="yellow"))
    session.show(table)


def _say(session: Session, found: "Reproducer", done: "Attempt", *, same: bool, local: bool) -> None:
    compared = compared_versions(found)
    if session.as_json:
        content: dict[str, Any] = {
            "same": same,
            "from": "before" if local else "start",
            "expected": dataclasses.asdict(found.failure),
            "failure": dataclasses.asdict(done.failure) if done.failure is not None else None,
            "error": str(done.error) if done.error is not None else None,
            "weights": found.weights,
            "versions": compared,
        }
        session.emit(content)
        return
    title = "It fails in the same way." if same else "It fails in another way." if done.failure else "It does not fail."
    session.show(Text(title, style="bold"))
    if done.error is not None:
        session.show(str(done.error))
    if not same:
        session.show("", Text("It failed with:", style="bold"), found.failure.text)
    session.show("")
    show_versions(session, compared)
    if not found.weights:
        session.note(WITHOUT_WEIGHTS)
