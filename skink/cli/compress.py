"""`skink compress`: the main job."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from skink.cli.arguments import (
    MEASURED,
    WORK,
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
    Overwrite,
    PromptTokens,
    Rounds,
    Seed,
    Training,
    TrainingDtype,
    TrainingField,
    TrainingLength,
    TrainingPacking,
    check_place,
    parse_overrides,
    training_text_options,
)
from skink.cli.console import Session, session_of
from skink.cli.export import refuse_existing
from skink.errors import SkinkError
from skink.settings import settings

if TYPE_CHECKING:
    from skink.compression import CompressOptions
    from skink.passes.recipe import Recipe

_SAMPLE_TOKENS = 48


def compress(
    context: typer.Context,
    model: Model,
    recipe: Annotated[
        str,
        typer.Option(
            help="A recipe that ships (skink passes lists them), a .yaml file, or one line as low-rank{keep=0.8}. "
            "Empty: the model as it is, in Skink's form.",
            metavar="R",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.", metavar="DIR")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PASS.OPTION=VALUE...", help="Change options of the recipe: low-rank.keep=0.7."),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write ONNX, to the folder onnx in DIR.")] = False,
    overwrite: Overwrite = False,
    prompt: Annotated[
        str | None, typer.Option(help="At the end, show how both models continue this text.", metavar="TEXT")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe, model, text and folder, say what would be done, and stop.")
    ] = False,
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
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The model that passes which train learn from. By default MODEL itself, as it was before the recipe.",
            metavar="MODEL",
            rich_help_panel=WORK,
            show_default=False,
        ),
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(
            help="A folder where passes that train keep their work. The same command again goes on from there.",
            metavar="DIR",
            rich_help_panel=WORK,
            show_default=False,
        ),
    ] = None,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate/--no-evaluate",
            help="Measure perplexity and speed before and after; of an encoder, its embeddings or scores.",
            rich_help_panel=MEASURED,
        ),
    ] = True,
    measure_layers: Annotated[
        bool,
        typer.Option(
            "--measure-layers",
            help="Also measure what each factored layer alone adds to the loss. Reads the held-out text once for each.",
            rich_help_panel=MEASURED,
        ),
    ] = False,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 128,
    new_tokens: NewTokens = 64,
    rounds: Rounds = 7,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: Seed = 0,
    verify: Annotated[
        int | None,
        typer.Option(
            metavar="0|1|2|3",
            min=0,
            max=3,
            help="Checks after each pass: 0 none, 1 structure, 2 numbers too (default, or SKINK_VERIFY), 3 numbers "
            "after every single edit.",
            rich_help_panel=WORK,
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a smaller model: run a recipe on MODEL, measure both, and write a folder with the result and a report."""
    session = session_of(context)
    from skink.passes.recipe import load_recipe
    from skink.passes.recover.asked import check_asked

    # A recipe with a mistake is refused before transformers is imported.
    loaded = load_recipe(recipe, parse_overrides(overrides or []))
    check_asked(
        loaded.everything,
        text=bool(training),
        cut=any(said is not None for said in (training_length, training_packing, training_field, training_dtype)),
        checkpoints=checkpoints is not None,
        teacher=teacher is not None,
    )
    if settings().main_process:
        refuse_existing(out, overwrite)
    check_place(dtype, device)
    from skink.cli.quiet import quiet_transformers

    with quiet_transformers():
        from skink.compression import CompressOptions, SpeedOptions, TextOptions

        options = CompressOptions(
            calibration=calibration or None,
            held_out=held_out or None,
            texts=TextOptions(calibration_windows, held_out_windows, length),
            speed=SpeedOptions(batch=batch, prompt=prompt_tokens, new_tokens=new_tokens, rounds=rounds),
            evaluate=evaluate,
            measure_layers=measure_layers,
            onnx=onnx,
            overwrite=overwrite,
            dtype=dtype,
            device=device,
            seed=seed,
            verify=verify,
            training=training or None,
            training_texts=training_text_options(training_length, training_packing, training_field, training_dtype),
            teacher=teacher,
            checkpoints=checkpoints,
        )
        if dry_run:
            from skink.cli.plan import plan

            plan(session, model, loaded, out, options)
        else:
            _compress(session, model, loaded, out, options, prompt)


def _compress(
    session: Session, name: str, recipe: "Recipe", out: Path, options: "CompressOptions", prompt: str | None
) -> None:
    from skink.cli.progress import PhaseProgress
    from skink.compression import compress_to_folder

    with PhaseProgress(session) as progress:
        report = compress_to_folder(name, recipe, out, options, progress=progress, status=progress.say)
        if not settings().main_process:
            return
        samples: dict[str, str] = {}
        if prompt is not None:
            progress("sample", 0, 1)
            try:
                samples = _samples({name: name, str(out): str(out)}, prompt, options)
            except SkinkError as error:
                # The folder is whole all the same.
                session.note(f"no sample: {error}")
            progress("sample", 1, 1)
    files = {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    if session.as_json:
        content: dict[str, Any] = {"out": str(out), "files": files, "report": json.loads(report.to_json())}
        if prompt is not None:
            content["samples"] = {"prompt": prompt, "continuations": samples}
        session.emit(content)
        return
    from skink.export.report import render

    session.show("", render(report), "")
    _show_folder(session, out, files)
    if prompt is not None:
        _show_samples(session, prompt, samples)


def _samples(models: dict[str, str], prompt: str, options: "CompressOptions") -> dict[str, str]:
    """How each model continues the prompt, greedily."""
    from skink.cli.generate import Choice, continue_text

    return {
        label: continue_text(
            name, prompt, Choice(max_new_tokens=_SAMPLE_TOKENS), dtype=options.dtype, device=options.device
        )
        for label, name in models.items()
    }


def _show_samples(session: Session, prompt: str, samples: dict[str, str]) -> None:
    for label, continuation in samples.items():
        session.show("", Text(f"{label} writes:", style="bold"))
        text = Text(prompt, style="dim")
        text.append(continuation, style="not dim")
        session.show(text)


def _show_folder(session: Session, out: Path, files: dict[str, int]) -> None:
    from skink.export.report.formatting import size

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for file, length in files.items():
        table.add_row(Text(file), size(length), _WHAT.get(file, ""))
    session.show(Text(f"{out}", style="bold"), table, "")
    session.show(Text("Use it", style="bold"), *(f"  {line}" if line else "" for line in _use(out, files)))


def _use(out: Path, files: dict[str, int]) -> list[str]:
    """Lines of a shell and of Python that run the result."""
    from skink.export.huggingface import SkinkConfig
    from skink.export.huggingface.forms import DECODER, named_form

    form = named_form(SkinkConfig.from_pretrained(str(out))) or DECODER
    lines = [] if form.encodes else [f"skink generate {shlex.quote(str(out))} 'def main():'"]
    if not form.encodes and any(file.startswith("onnx/") for file in files):
        lines.append(f"skink generate {shlex.quote(str(out / 'onnx'))} 'def main():'    # in ONNX Runtime")
    lines += ["", "import skink                                     # in Python"]
    if "modules.json" in files:
        return [
            *lines[1:],
            "from sentence_transformers import SentenceTransformer",
            f"SentenceTransformer({str(out)!r})",
        ]
    return [
        *lines,
        f"from transformers import {form.auto}, AutoTokenizer",
        f"model = {form.auto}.from_pretrained({str(out)!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({str(out)!r})",
    ]


_WHAT = {
    "report.html": "what it cost and gained: open it in a browser",
    "report.json": "the same, for programs",
    "recipe.yaml": "what was done, with every option",
    "graph.json": "the model's graph",
    "model.safetensors": "its weights",
    "README.md": "the model card",
    "onnx/model.onnx": "for ONNX Runtime: prefill and decode in one graph",
}
