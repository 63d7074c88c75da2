"""The main job on disk: a checkpoint in, a folder out, with the report of what it cost and what it gained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from skink.compression.compress import Compression, Progress, RecipeLike, compress_program
from skink.compression.forms import Job, compare, measure_decoder, measure_encoder, measure_layers
from skink.compression.measure import RESULT, Measured, SpeedOptions, build_report, speed_notes
from skink.compression.texts import (
    STANDARD_LIBRARY,
    HeldOutTexts,
    TextLike,
    TextOptions,
    Windows,
    calibration_and_held_out,
    encoder_texts,
    longest_text,
)
from skink.evaluation import GenerationTarget
from skink.export.folder import output_folder
from skink.export.huggingface import load_source, save
from skink.export.huggingface.card import CARD_FILE
from skink.export.huggingface.loading import STDLIB_LLAMA, holds_encoder, stored_dtype
from skink.export.huggingface.sentences import SentenceSettings, sentence_settings
from skink.export.report import Report, card_section, write_report
from skink.graph.pipeline import Pipeline
from skink.passes.canonicalize import Canonicalize
from skink.passes.recipe import load_recipe


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
        measure_layers: also measure what each factored layer alone adds to a decoder's loss: one perplexity each.
        onnx: also write ONNX, to the folder `onnx` in the output folder.
        overwrite: replace an output folder that exists.
        dtype: of the weights while working; `auto` is float32 on the CPU for weights stored in half precision. They are
            stored in the checkpoint's dtype.
        device: where to work.
        seed: for anything random.
        verify: 0 to 3, see `SKINK_VERIFY`, which is the default.
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


def _silent(name: str, done: int, total: int) -> None:
    pass


def compress_to_folder(
    name: str,
    recipe: RecipeLike,
    out: Path,
    options: CompressOptions | None = None,
    *,
    progress: Progress = _silent,
) -> Report:
    """Compress a checkpoint into a folder that transformers and `skink.load` read; returns the report it holds.

    Args:
        name: a hub id, a folder, or `stdlib-llama` for the model that ships.
        recipe: see `skink.passes.recipe.load_recipe`.
        out: the folder to make; it appears when all is done, or not at all.
        options: see `CompressOptions`.
        progress: called as (what, done, total).

    Raises:
        SkinkError: see docs/errors.md.
    """
    options = options or CompressOptions()
    # What can be refused without work is refused before any.
    loaded_recipe = load_recipe(recipe, options.overrides)
    Pipeline((Canonicalize(), *loaded_recipe.passes))
    calibration_text = options.calibration
    if calibration_text is None and name == STDLIB_LLAMA:
        calibration_text = STANDARD_LIBRARY
    with output_folder(out, overwrite=options.overwrite) as folder:
        progress("load", 0, 1)
        encoder = holds_encoder(name)
        source, tokenizer = load_source(name, dtype=options.dtype, device=options.device, encoders=encoder)
        stored = stored_dtype(name)
        settings = sentence_settings(name) if encoder else SentenceSettings()
        progress("load", 1, 1)
        longest = longest_text(source, tokenizer, settings.longest)
        calibration: Windows | None
        held_out: Windows | HeldOutTexts | None
        calibration, held_out = (encoder_texts if encoder else calibration_and_held_out)(
            tokenizer, calibration_text, options.held_out, options.texts, longest=longest
        )
        done = compress_program(
            source,
            loaded_recipe,
            calibration=calibration.tokens if calibration is not None else None,
            padding=calibration.padding if calibration is not None else None,
            seed=options.seed,
            verify=options.verify,
            progress=progress,
        )
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
        job = Job(done, source, folder, stored, calibration, options, progress)
        compared: dict[str, Measured] = {}
        losses: dict[str, float] = {}
        if isinstance(held_out, HeldOutTexts) or encoder:
            forms = measure_encoder(job, held_out if isinstance(held_out, HeldOutTexts) else None, settings)
        else:
            forms = measure_decoder(job, held_out, runtime)
            losses = measure_layers(job, held_out)
            compared = compare(job, held_out)
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
    return report


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
