"""The main job on disk: a checkpoint in, a folder out, with the report of what it cost and what it gained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from skink.compression.compress import Compression, Progress, RecipeLike, compress_program
from skink.compression.forms import Job, alternatives, compare, measure_decoder, measure_encoder, measure_layers
from skink.compression.measure import RESULT, Measured, SpeedOptions, build_report, speed_notes
from skink.compression.preparation import Prepared, check_texts, prepare
from skink.compression.text_options import TextOptions, TrainingTextOptions
from skink.compression.texts import HeldOutTexts, TextLike
from skink.evaluation import GenerationTarget
from skink.export.folder import output_folder
from skink.export.huggingface import save
from skink.export.huggingface.card import CARD_FILE
from skink.export.report import Report, card_section, read_report, write_report
from skink.graph.pipeline import Pipeline
from skink.graph.progress import silent
from skink.passes.canonicalize import Canonicalize
from skink.passes.recipe import Recipe, load_recipe
from skink.settings import settings
from skink.training.loop.processes import wait_for_all


@dataclass(frozen=True)
class CompressOptions:
    """What `skink compress` can be told besides model, recipe and output folder.

    Args:
        calibration: files, folders or the word `stdlib`; the model that ships has `stdlib` by default.
        held_out: text to judge on; a part of the calibration text that calibration does not see by default.
        overrides: `{"low-rank.keep": 0.7}`.
        texts: how text is cut.
        speed: the workload to measure.
        evaluate: measure perplexity and speed before and after, of an encoder its embeddings or scores.
        measure_layers: also measure what each factored layer alone adds to the loss, for one reading of the text each.
        onnx: also write ONNX, to the folder `onnx` in the output folder.
        overwrite: replace an output folder that exists.
        dtype: of the weights while working; `auto` is float32 on the CPU for weights stored in half precision. They are
            stored in the checkpoint's dtype.
        device: where to work.
        seed: for anything random.
        verify: 0 to 3, see `SKINK_VERIFY`, which is the default.
        training: text to train on, for passes that do: whatever `training_windows` takes. By default the standard
            library for the model that ships, and for others the text to calibrate on.
        training_texts: how text to train on is read and cut.
        teacher: a hub id or folder of a model to learn from; by default the one that is compressed.
        checkpoints: folder where such passes keep their work: the same once more goes on from there.
    """

    calibration: TextLike | None = None
    held_out: TextLike | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    texts: TextOptions = field(default_factory=TextOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    evaluate: bool = True
    measure_layers: bool = False
    onnx: bool = False
    overwrite: bool = False
    dtype: str = "auto"
    device: str = "cpu"
    seed: int = 0
    verify: int | None = None
    training: Any = None
    training_texts: TrainingTextOptions = field(default_factory=TrainingTextOptions)
    teacher: str | None = None
    checkpoints: Path | None = None


def compress_to_folder(
    name: str,
    recipe: RecipeLike,
    out: Path,
    options: CompressOptions | None = None,
    *,
    progress: Progress = silent,
    status: Callable[[str], None] = silent,
) -> Report:
    """Compress a checkpoint into a folder that transformers and `skink.load` read; returns the report it holds.

    Where several processes were started together, they train together: the first of them does the rest of the work, and
    the others wait for it.

    Args:
        name: a hub id, a folder, or `stdlib-llama` for the model that ships.
        recipe: see `skink.passes.recipe.load_recipe`.
        out: the folder to make; it appears when all is done, or not at all.
        options: see `CompressOptions`.
        progress: called as (what, done, total).
        status: told now and then what a pass that takes long is at.

    Raises:
        SkinkError: see docs/errors.md.
    """
    options = options or CompressOptions()
    # What can be refused without work is refused before any.
    loaded_recipe = load_recipe(recipe, options.overrides)
    Pipeline((Canonicalize(), *loaded_recipe.passes))
    check_texts(name, loaded_recipe, options)
    if not settings().main_process:
        return _follow(name, loaded_recipe, out, options)
    with output_folder(out, overwrite=options.overwrite) as folder:
        found = prepare(name, loaded_recipe, options, progress)
        source, tokenizer, stored, encoder = found.source, found.tokenizer, found.stored, found.encoder
        calibration, held_out = found.texts.calibration, found.texts.held_out
        done = _run(found, loaded_recipe, options, progress, status)
        done.program.origin["name"] = name
        save(
            done.program.with_dtype(stored),
            source.config,
            source.generation_config if not encoder else None,
            tokenizer,
            folder,
            source=name if encoder else "",
            name=out.name,
        )
        (folder / "recipe.yaml").write_text(loaded_recipe.to_yaml(), encoding="utf-8")
        runtime: GenerationTarget[Any] | None = None
        if options.onnx:
            runtime = _write_onnx(done, source, tokenizer, folder / "onnx", progress, runs=not encoder)
        job = _job(found, done, folder, options, progress, status)
        compared: dict[str, Measured] = {}
        if isinstance(held_out, HeldOutTexts) or encoder:
            judged = held_out if isinstance(held_out, HeldOutTexts) else None
            forms = measure_encoder(job, judged, found.sentences)
        else:
            forms = measure_decoder(job, held_out, runtime)
            compared = compare(job, held_out)
        losses = measure_layers(job, held_out)
        if compared:
            compared = {f"this recipe: {done.recipe}": forms[RESULT], **compared}
        report = build_report(
            done,
            forms,
            compared,
            name=name,
            calibration=calibration,
            seed=options.seed,
            dtype=str(stored).removeprefix("torch."),
            notes=_notes(forms, encoder=encoder, judged=held_out is not None, changed=bool(loaded_recipe.passes)),
            layer_losses=losses,
        )
        write_report(report, folder)
        _add_to_card(folder, report)
    wait_for_all(options.device)
    return report


def _follow(name: str, recipe: Recipe, out: Path, options: CompressOptions) -> Report:
    """What a process does that is not the first: it trains whenever the first does, and writes nothing."""
    if any(entry.training_tokens(options.texts.length) for entry in recipe.everything):
        found = prepare(name, recipe, options, silent)
        done = _run(found, recipe, options, silent, silent)
        held_out = found.texts.held_out
        judged = isinstance(held_out, HeldOutTexts) if found.encoder else held_out is not None
        if options.evaluate and judged:
            for _ in alternatives(_job(found, done, out, options, silent, silent)):
                pass
    wait_for_all(options.device)
    return read_report(out)


def _run(
    found: Prepared, recipe: Recipe, options: CompressOptions, progress: Progress, status: Callable[[str], None]
) -> Compression:
    calibration = found.texts.calibration
    return compress_program(
        found.source,
        recipe,
        calibration=calibration.tokens if calibration is not None else None,
        padding=calibration.padding if calibration is not None else None,
        seed=options.seed,
        verify=options.verify,
        progress=progress,
        training=found.texts.training,
        held_out=found.texts.judged,
        teacher=found.teacher,
        checkpoints=options.checkpoints,
        status=status,
    )


def _job(
    found: Prepared,
    done: Compression,
    folder: Path,
    options: CompressOptions,
    progress: Progress,
    status: Callable[[str], None],
) -> Job:
    texts = found.texts
    return Job(
        done,
        found.source,
        folder,
        found.stored,
        texts.calibration,
        options,
        progress,
        training=texts.training,
        judged=texts.judged,
        teacher=found.teacher,
        status=status,
    )


def _notes(forms: Mapping[str, Measured], *, encoder: bool, judged: bool, changed: bool) -> list[str]:
    notes = (
        [] if judged else [f"No held-out text was given: {'quality' if encoder else 'perplexity'} was not measured."]
    )
    if encoder:
        return [*notes, "Speed was not measured: that is done by generating text, which an encoder does not."]
    return [*notes, *(speed_notes(forms) if changed else [])]


def _write_onnx(
    done: Compression, source: Any, tokenizer: Any, folder: Path, progress: Progress, *, runs: bool
) -> GenerationTarget[Any] | None:
    """Writes ONNX; gives what generates with it, where `runs` says that the model generates."""
    from skink.export.onnx import OrtRunner, export_onnx

    progress("onnx", 0, 1)
    export_onnx(
        done.program,
        folder,
        tokenizer=tokenizer,
        config=source.config,
        generation_config=source.generation_config if runs else None,
    )
    progress("onnx", 1, 1)
    if not runs:
        return None
    runner: GenerationTarget[Any] = OrtRunner(folder, threads=torch.get_num_threads())
    return runner


def _add_to_card(folder: Path, report: Report) -> None:
    """What was saved, at the end of the model card."""
    card, section = folder / CARD_FILE, card_section(report)
    if section and card.exists():
        card.write_text(f"{card.read_text(encoding='utf-8').rstrip()}\n\n{section}", encoding="utf-8")
