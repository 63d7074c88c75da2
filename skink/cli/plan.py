"""`skink compress --dry-run`: everything that can be checked without working."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from skink.cli.console import Session
from skink.cli.models import captured_program

if TYPE_CHECKING:
    from skink.compression import CompressOptions
    from skink.graph.program import Program
    from skink.passes.recipe import Recipe


def plan(session: Session, name: str, recipe: "Recipe", out: Path, options: "CompressOptions") -> None:
    """Say what would be done. Weights are not read, nothing is written.

    Raises:
        SkinkError: as `compress_to_folder` would, as far as that can be known.
    """
    from skink.compression.preparation import check_texts
    from skink.export.huggingface.loading import holds_encoder
    from skink.graph.cost import program_cost
    from skink.graph.pipeline import Pipeline
    from skink.passes.canonicalize import Canonicalize

    pipeline = Pipeline((Canonicalize(), *recipe.passes))
    check_texts(name, recipe, options)
    texts = _texts(name, recipe, options)
    program = captured_program(name, meta=True)
    cost = program_cost(program)
    if any(entry.training_tokens(2) for entry in recipe.everything):
        _check_start(program, recipe, options)
    stages = [{"pass": str(entry), "exactness": entry.exactness} for entry in pipeline.passes]
    content: dict[str, Any] = {
        "dry_run": True,
        "model": {"name": name, "model_type": program.origin.get("model_type", ""), "parameters": cost.parameters},
        "recipe": str(recipe),
        "passes": stages,
        "text": texts,
        "training": _training(name, recipe, options),
        "out": str(out),
        "onnx": options.onnx,
        "evaluate": options.evaluate,
    }
    if session.as_json:
        session.emit(content)
        return
    from skink.export.report.formatting import count

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("model", f"{name} ({content['model']['model_type']}), {count(cost.parameters)} parameters")
    for index, stage in enumerate(stages):
        table.add_row("passes" if index == 0 else "", Text(f"{index + 1}. {stage['pass']} ({stage['exactness']})"))
    for split, text in texts.items():
        table.add_row(
            split, Text(f"{text['source']}: {text['documents']} documents, {text['characters']:,} characters")
        )
    for entry in content["training"]:
        said = f"{entry['tokens']:,} tokens of {entry['text']}"
        table.add_row("training", Text(said + (f", against {options.teacher}" if options.teacher else "")))
    if not texts:
        table.add_row("text", "none: nothing is calibrated, and quality is not measured")
    quality = "embeddings or scores" if holds_encoder(name) else "perplexity and speed"
    table.add_row("measured", f"{quality}, before and after" if options.evaluate else "sizes only")
    table.add_row("written to", Text(str(out) + (", and ONNX to its folder onnx" if options.onnx else "")))
    session.show(table, Text("Dry run: nothing was written.", style="dim"))


def _check_start(program: "Program", recipe: "Recipe", options: "CompressOptions") -> None:
    """Refuse a loss that the model has not, and a teacher that does not fit it."""
    from skink.graph.pipeline import Pipeline
    from skink.passes.canonicalize import Canonicalize

    models = [program.clone()]
    if options.teacher is not None:
        models.append(captured_program(options.teacher, meta=True).clone())
    for model in models:
        Pipeline((Canonicalize(),)).run(model, seed=options.seed, verify=0)
    for entry in recipe.everything:
        entry.check_start(models[0], models[-1])


def _training(name: str, recipe: "Recipe", options: "CompressOptions") -> list[dict[str, Any]]:
    """What each pass that trains reads."""
    from skink.compression.chosen_texts import training_text
    from skink.export.huggingface.loading import STDLIB_LLAMA

    text = training_text(options.training, options.calibration, ships=name == STDLIB_LLAMA)
    named = text if isinstance(text, str) else ", ".join(map(str, text or ()))
    length = options.training_texts.length or options.texts.length
    reads = [(str(entry), entry.training_tokens(length)) for entry in recipe.passes]
    return [{"pass": entry, "tokens": tokens, "text": named} for entry, tokens in reads if tokens]


def _texts(name: str, recipe: "Recipe", options: "CompressOptions") -> dict[str, dict[str, Any]]:
    from skink.compression.texts import STANDARD_LIBRARY, read_documents
    from skink.errors import CalibrationError
    from skink.export.huggingface.loading import STDLIB_LLAMA

    calibration = options.calibration
    if calibration is None and name == STDLIB_LLAMA:
        calibration = STANDARD_LIBRARY
    if calibration is None:
        needing = [str(entry) for entry in recipe.passes if entry.needs_calibration]
        if needing:
            raise CalibrationError(
                "CALIBRATION-002",
                f"pass {needing[0]} needs calibration text, and none was given.",
                fix="give --calibration FILES, or --calibration stdlib for Python source.",
            )
    chosen = {"calibration": calibration, "held-out": options.held_out}
    found: dict[str, dict[str, Any]] = {}
    for split, text in chosen.items():
        if text is not None:
            documents = read_documents(text, split=split)
            found[split] = {
                "source": documents.name,
                "sha256": documents.sha256,
                "documents": len(documents.texts),
                "characters": sum(len(entry) for entry in documents.texts),
            }
    return found
