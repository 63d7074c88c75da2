"""`skink eval`: perplexity, questions and tasks, with their settings."""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from skink.cli.arguments import AsJson, Device, Dtype, Model, check_place
from skink.cli.console import session_of

if TYPE_CHECKING:
    from skink.cli.progress import PhaseProgress
    from skink.evaluation import Accuracy, Documents


def evaluate(
    context: typer.Context,
    model: Model,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="FILES...",
            help="Text to score: files, folders, or the word stdlib, the held-out part of Python's standard library "
            "(the default).",
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows, evenly spaced over the text.", metavar="N")] = 64,
    length: Annotated[
        int, typer.Option(min=2, help="Tokens in a window; at most what the model's positions allow.", metavar="N")
    ] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Windows at once.", metavar="N")] = 8,
    questions: Annotated[
        int, typer.Option(min=0, help="Multiple-choice questions of each kind, made from the text.", metavar="N")
    ] = 0,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Tasks of lm-eval too, where it is installed: names or YAML files.", metavar="TASK..."),
    ] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.", metavar="N")] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of MODEL on text, and what else is asked for, and say under which settings."""
    session = session_of(context)
    check_place(dtype, device)
    from skink.cli.quiet import quiet_transformers

    with quiet_transformers():
        from skink.cli.models import load_model, tokenizer_of
        from skink.cli.progress import PhaseProgress
        from skink.compression.texts import read_documents
        from skink.evaluation import held_out_perplexity
        from skink.evaluation.harness import check_tasks, run_tasks

        if tasks:
            check_tasks(tasks)
        documents = read_documents(text or "stdlib", split="held-out")
        with PhaseProgress(session) as progress:
            progress("load", 0, 1)
            loaded = load_model(model, dtype=dtype, device=device)
            tokenizer = tokenizer_of(model, loaded)
            progress("load", 1, 1)
            progress("perplexity", 0, windows)
            longest = getattr(loaded.model.config, "max_position_embeddings", None) or length
            measured = held_out_perplexity(
                loaded.model,
                tokenizer,
                documents=documents,
                length=min(length, longest),
                count=windows,
                batch=batch,
                progress=lambda done, total: progress("perplexity", done, total),
            )
            answered = _answers(loaded.model, tokenizer, documents, questions, progress) if questions else []
            if tasks:
                progress("tasks", 0, 1)
            scores = run_tasks(loaded.model, tokenizer, tasks, limit=task_limit) if tasks else ()
            progress("tasks", 1, 1)
    values = dataclasses.asdict(measured)
    if session.as_json:
        content = {"model": model, "perplexity": values.pop("value"), **values}
        if questions:
            content["questions"] = [dataclasses.asdict(each) for each in answered]
        if tasks:
            content["tasks"] = [dataclasses.asdict(each) for each in scores]
        session.emit(content)
        return
    step = f", one every {measured.stride:,.0f} tokens" if measured.stride is not None else ""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row("perplexity", Text(f"{measured.value:.4f}", style="bold"))
    table.add_row("nats per token", f"{measured.nats_per_token:.5f}")
    table.add_row("predictions", f"{measured.tokens:,}")
    table.add_row("text", Text(f"{measured.source} (sha256 {measured.data_hash[:12]})"))
    table.add_row("windows", f"{measured.windows} of {measured.length} tokens{step}")
    table.add_row("run", f"{measured.dtype} on {measured.device}, batch {measured.batch}")
    for each in answered:
        table.add_row(each.kind, f"{100 * each.value:.1f}% ± {100 * each.standard_error:.1f} of {each.n} questions")
    for score in scores:
        table.add_row(score.name, f"{100 * score.accuracy:.1f}% {score.score} of {score.n} documents")
    session.show(Text(model, style="bold"), table)


def _answers(
    model: Any, tokenizer: Any, documents: "Documents", count: int, progress: "PhaseProgress"
) -> "list[Accuracy]":
    """Accuracy on each kind of question that the text gives."""
    from skink.evaluation import answer
    from skink.exploration.qualities import questions_from

    return [
        answer(model, each, progress=partial(progress, f"{each.kind} questions"))
        for each in questions_from(documents, tokenizer, count, 0).questions
    ]
