"""`skink bench`: generation speed of models side by side."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from skink.cli.arguments import AsJson, Device, Dtype, check_place
from skink.cli.console import session_of

if TYPE_CHECKING:
    from skink.evaluation import Speed, Spread


def bench(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="The model in question: as MODEL, or a folder of an ONNX model.")
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against", metavar="MODEL...", help="Models to compare it with; ratios are to the first of them."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.", metavar="N")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.", metavar="N")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated after it.", metavar="N")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often each model runs, in turn.", metavar="N")] = 7,
    seed: Annotated[int, typer.Option(help="Of the prompts.", metavar="N")] = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Time how fast DIR generates, in turn with the models that it is compared with."""
    session = session_of(context)
    check_place(dtype, device)
    from skink.cli.quiet import quiet_transformers

    with quiet_transformers():
        from skink.cli.models import load_target
        from skink.cli.progress import PhaseProgress
        from skink.evaluation import machine, measure_generation

        # The first is what the ratios are to. A model may stand against itself: that shows the noise.
        names = [*(against or []), model]
        labels = [name if names.index(name) == index else f"{name} ({index + 1})" for index, name in enumerate(names)]
        with PhaseProgress(session) as progress:
            targets = {}
            for index, (label, name) in enumerate(zip(labels, names, strict=True)):
                progress("load", index, len(names))
                targets[label] = load_target(name, dtype=dtype, device=device)
            progress("load", len(names), len(names))
            progress("speed", 0, rounds + 1)
            speeds = measure_generation(
                targets,
                batch=batch,
                prompt=prompt_tokens,
                new_tokens=new_tokens,
                rounds=rounds,
                seed=seed,
                progress=lambda done, total: progress("speed", done, total),
            )
        here = machine()
    if session.as_json:
        content = {label: dataclasses.asdict(speed) for label, speed in speeds.items()}
        session.emit({"models": content, "machine": dataclasses.asdict(here)})
        return
    session.show(_table(speeds))
    ratios = f"; ratios to {labels[0]}, medians of those within a round" if against else ""
    session.show(
        Text(
            f"batch {batch}, prompts of {prompt_tokens} random tokens (seed {seed}), {new_tokens} new tokens, "
            f"medians (lowest to highest) of {rounds} rounds in turn{ratios}",
            style="dim",
        ),
        Text(str(here), style="dim"),
    )


def _table(speeds: dict[str, "Speed"]) -> Table:
    compared = len(speeds) > 1
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", overflow="fold")
    for column in ("prefill, tok/s", "decode, tok/s", "first token, ms"):
        table.add_column(column, justify="right")
    for label, speed in speeds.items():
        ratio = compared and label != speed.baseline
        table.add_row(
            Text(label, style="bold"),
            _rate(speed.prefill, speed.prefill_ratio if ratio else None),
            _rate(speed.decode, speed.decode_ratio if ratio else None),
            Text(f"{speed.first_token.median * 1e3:.1f}"),
        )
    return table


def _rate(rate: "Spread", ratio: "Spread | None") -> Text:
    from skink.export.report import formatting as fmt

    text = Text(f"{rate.median:,.0f}")
    if ratio is not None:
        # No colour where rounds disagree on which is faster.
        clear = ratio.low > 1 or ratio.high < 1
        style = ("green" if ratio.median > 1 else "red") if clear else "dim"
        text.append(f" {fmt.ratio(ratio.median, 2)}", style=style)
    text.append(f"\n{rate.low:,.0f} to {rate.high:,.0f}", style="dim")
    return text
