"""`skink explore`: a design space on a model, and the map that comes of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from skink.cli.arguments import (
    MEASURED,
    AsJson,
    Batch,
    Calibration,
    CalibrationWindows,
    Device,
    Dtype,
    HeldOut,
    HeldOutWindows,
    Length,
    Model,
    NewTokens,
    PromptTokens,
    Rounds,
    Seed,
    Training,
    TrainingDtype,
    TrainingField,
    TrainingLength,
    TrainingPacking,
    check_place,
    training_text_options,
)
from skink.cli.console import Session, session_of

if TYPE_CHECKING:
    from skink.exploration import Exploration


def explore(
    context: typer.Context,
    model: Model,
    space: Annotated[
        str,
        typer.Option(
            help="A space that ships (quick, low-rank, study) or a YAML file; see docs/explore.md.", metavar="SPACE"
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="A folder; what is finished there is kept, and not done again.", metavar="DIR"),
    ],
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes side by side, each with the model in memory.", metavar="N")
    ] = 1,
    max_points: Annotated[
        int | None, typer.Option(min=1, help="At most so many points, drawn by the seed.", metavar="N")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run points again that failed before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the points, and run none.")] = False,
    calibration: Calibration = None,
    held_out: HeldOut = None,
    training: Training = None,
    calibration_windows: CalibrationWindows = 128,
    held_out_windows: HeldOutWindows = 64,
    length: Length = 512,
    training_length: TrainingLength = None,
    training_packing: TrainingPacking = None,
    training_field: TrainingField = None,
    training_dtype: TrainingDtype = None,
    quality: Annotated[
        list[str] | None,
        typer.Option(
            help="perplexity, questions, tasks; or embedding, for encoders. Perplexity and questions by default.",
            metavar="NAME...",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks of lm-eval, where it is installed: names or YAML files.",
            metavar="TASK...",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    task_limit: Annotated[
        int | None,
        typer.Option(min=1, help="Documents of each task.", metavar="N", rich_help_panel=MEASURED),
    ] = None,
    questions: Annotated[
        int, typer.Option(min=1, help="Questions of each kind.", metavar="N", rich_help_panel=MEASURED)
    ] = 100,
    latency: Annotated[
        bool,
        typer.Option("--latency/--no-latency", help="Time generation, one point at a time.", rich_help_panel=MEASURED),
    ] = True,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 32,
    new_tokens: NewTokens = 32,
    rounds: Rounds = 5,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Make every point of a design space of MODEL, and map quality against size, work and speed.

    The folder DIR gets explore.html, to be opened in a browser, and explore.json. An interrupted run goes on where it
    was when the same command is given again.
    """
    session = session_of(context)
    check_place(dtype, device)
    from skink.exploration.space import load_space

    loaded = load_space(space)
    from skink.cli.quiet import quiet_transformers

    with quiet_transformers():
        from skink.cli.progress import PhaseProgress
        from skink.compression import SpeedOptions, TextOptions
        from skink.exploration import ExploreOptions
        from skink.exploration import explore as run

        kinds = tuple(quality or ())
        if tasks and not kinds:
            kinds = ("perplexity", "tasks")
        options = ExploreOptions(
            calibration=calibration or None,
            held_out=held_out or None,
            training=training or None,
            training_texts=training_text_options(training_length, training_packing, training_field, training_dtype),
            texts=TextOptions(calibration_windows, held_out_windows, length),
            quality=kinds,
            questions=questions,
            tasks=tuple(tasks or ()),
            task_limit=task_limit,
            latency=latency,
            speed=SpeedOptions(batch=batch, prompt=prompt_tokens, new_tokens=new_tokens, rounds=rounds),
            jobs=jobs,
            max_points=max_points,
            retry=retry,
            dtype=dtype,
            device=device,
            seed=seed,
        )
        if dry_run:
            _list(session, model, loaded, options)
            return
        with PhaseProgress(session) as progress:
            found = run(model, loaded, out, options, progress=progress)
    if session.as_json:
        import json

        session.emit({"out": str(out), **json.loads(found.to_json())})
        return
    _show(session, found, out)


def _list(session: Session, model: str, space: Any, options: Any) -> None:
    """The points that would run."""
    from skink.exploration.points import expand
    from skink.exploration.workbench import Workbench

    bench = Workbench.load(model, options)
    points = expand(space, bench.facts, most=options.max_points, seed=options.seed)
    bench.refuse(points)
    if session.as_json:
        listed = [{"family": point.family, "values": dict(point.values), "recipe": point.text} for point in points]
        session.emit({"model": model, "space": space.name, "points": listed})
        return
    for point in points:
        session.show(Text.assemble((point.family, "dim"), "  ", str(point.recipe)))
    session.show("", Text(f"Dry run: {len(points):,} points, none was run.", style="dim"))


def _show(session: Session, found: "Exploration", out: Path) -> None:
    """The front by the first quality and by size, and where the rest is."""
    from skink.exploration.result import QUALITIES
    from skink.exploration.wording import beside_dense, name, percent, relative, shown

    quality = next(entry for entry in QUALITIES if entry in found.measured)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    costs = [cost for cost in ("linear_parameters", "macs_per_token", "latency") if cost in found.measured]
    for head in (QUALITIES[quality].label, "beside dense", "linear par.", "MACs", "time/token")[: 2 + len(costs)]:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("point")
    for number in found.front(quality, "linear_parameters"):
        point = found.everything[number]
        sizes = [percent(relative(found, point, cost)) for cost in costs]
        said = Text.assemble((f"{point.family}  " if point.family else "", "dim"), name(point))
        table.add_row(shown(quality, point), beside_dense(found, quality, point), *sizes, said)
    failed = sum(point.error is not None for point in found.points)
    title = f"{found.model['name']}, {found.space['name']}: {len(found.points)} points"
    session.show(Text(title + (f", {failed} failed" if failed else ""), style="bold"))
    session.show(f"No point is better than these with no more parameters, by {QUALITIES[quality].label.lower()}:")
    session.show(table, "", f"{out / 'explore.html'}    open it in a browser", f"{out / 'explore.json'}")
