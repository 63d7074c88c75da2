"""`skink eval`: perplexity with its settings."""

import dataclasses
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from skink.cli.arguments import AsJson, Device, Dtype, Model, check_place
from skink.cli.console import session_of


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
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of MODEL on text, and say under which settings."""
    session = session_of(context)
    check_place(dtype, device)
    from skink.cli.quiet import quiet_transformers

    with quiet_transformers():
        from skink.cli.models import load_model, tokenizer_of
        from skink.cli.progress import PhaseProgress
        from skink.compression.texts import read_documents
        from skink.evaluation import held_out_perplexity

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
    values = dataclasses.asdict(measured)
    if session.as_json:
        session.emit({"model": model, "perplexity": values.pop("value"), **values})
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
    session.show(Text(model, style="bold"), table)
