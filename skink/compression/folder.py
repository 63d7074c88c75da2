"""The main job on disk: a checkpoint in, a folder out, with the report of what it cost and what it gained."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from skink.compression.compress import Compression, Progress, RecipeLike, compress_program
from skink.compression.measure import (
    DENSE,
    RESULT,
    RUNTIME,
    SOURCE,
    Measured,
    SpeedOptions,
    build_report,
    score,
    speed_notes,
)
from skink.compression.texts import (
    STANDARD_LIBRARY,
    TextLike,
    TextOptions,
    Windows,
    calibration_and_held_out,
)
from skink.evaluation import GenerationTarget, HuggingFaceTarget, measure_generation
from skink.export.folder import output_folder
from skink.export.huggingface import load, load_source, save, to_huggingface
from skink.export.huggingface.loading import STDLIB_LLAMA, stored_dtype
from skink.export.report import Report, write_report
from skink.graph.cost import program_cost
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
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
        evaluate: measure perplexity and speed before and after.
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
        source, tokenizer = load_source(name, dtype=options.dtype, device=options.device)
        stored = stored_dtype(name)
        progress("load", 1, 1)
        calibration, held_out = calibration_and_held_out(
            tokenizer,
            calibration_text,
            options.held_out,
            options.texts,
            longest=getattr(source.config, "max_position_embeddings", None),
        )
        done = compress_program(
            source,
            loaded_recipe,
            calibration=calibration.tokens if calibration is not None else None,
            seed=options.seed,
            verify=options.verify,
            progress=progress,
        )
        done.program.origin["name"] = name
        save(done.program.with_dtype(stored), source.config, source.generation_config, tokenizer, folder, name=out.name)
        (folder / "recipe.yaml").write_text(loaded_recipe.to_yaml(), encoding="utf-8")
        notes = [] if held_out is not None else ["No held-out text was given: perplexity was not measured."]
        runtime: GenerationTarget[Any] | None = None
        if options.onnx:
            runtime = _write_onnx(done, source, tokenizer, folder / "onnx", progress)
        forms = _measure(done, source, folder, stored, held_out, runtime, options, progress)
        compared = _compare(done, source, stored, calibration, held_out, options, progress)
        if compared:
            compared = {"this recipe: " + done.recipe.describe(): forms[RESULT], **compared}
        report = build_report(
            done,
            forms,
            compared,
            name=name,
            calibration=calibration,
            seed=options.seed,
            dtype=str(stored).removeprefix("torch."),
            notes=[*notes, *(speed_notes(forms) if loaded_recipe.passes else [])],
        )
        write_report(report, folder)
    return report


def _write_onnx(
    done: Compression, source: Any, tokenizer: Any, folder: Path, progress: Progress
) -> GenerationTarget[Any]:
    from skink.export.onnx import OrtRunner, export_onnx

    progress("onnx", 0, 1)
    export_onnx(
        done.program,
        folder,
        tokenizer=tokenizer,
        config=source.config,
        generation_config=source.generation_config,
    )
    progress("onnx", 1, 1)
    runner: GenerationTarget[Any] = OrtRunner(folder, threads=torch.get_num_threads())
    return runner


def _measure(
    done: Compression,
    source: Any,
    folder: Path,
    stored: torch.dtype,
    held_out: Windows | None,
    runtime: GenerationTarget[Any] | None,
    options: CompressOptions,
    progress: Progress,
) -> dict[str, Measured]:
    """Every form's size; its perplexity and speed too where that is wanted. What is measured is what was written."""
    dense_cost = program_cost(done.dense.with_dtype(stored))
    result_cost = program_cost(done.program.with_dtype(stored))
    forms = {SOURCE: Measured(dense_cost), DENSE: Measured(dense_cost), RESULT: Measured(result_cost)}
    if not options.evaluate:
        return forms
    models = {
        SOURCE: source,
        DENSE: to_huggingface(done.dense, source.config, source.generation_config),
        RESULT: load(folder, device=options.device, dtype=options.dtype),
    }
    if held_out is not None:
        for index, (form, model) in enumerate(models.items()):
            progress("perplexity", index, len(models))
            forms[form] = replace(forms[form], perplexity=score(model, held_out))
        progress("perplexity", len(models), len(models))
    targets: dict[str, GenerationTarget[Any]] = {form: HuggingFaceTarget(model) for form, model in models.items()}
    if runtime is not None:
        targets[RUNTIME] = runtime
        forms[RUNTIME] = Measured(program_cost(done.program))
    longest = getattr(source.config, "max_position_embeddings", None) or 1 << 30
    prompt = min(options.speed.prompt, max(1, longest // 2))
    speeds = measure_generation(
        targets,
        batch=options.speed.batch,
        prompt=prompt,
        new_tokens=min(options.speed.new_tokens, max(1, longest - prompt - 1)),
        rounds=options.speed.rounds,
        seed=options.seed,
        progress=lambda done_rounds, total: progress("speed", done_rounds, total),
    )
    return {form: replace(measured, speed=speeds[form]) for form, measured in forms.items()}


def _compare(
    done: Compression,
    source: Any,
    stored: torch.dtype,
    calibration: Windows | None,
    held_out: Windows | None,
    options: CompressOptions,
    progress: Progress,
) -> dict[str, Measured]:
    """Perplexity of the recipe's alternatives, on the same text."""
    if not options.evaluate or held_out is None:
        return {}
    measured: dict[str, Measured] = {}
    for index, alternative in enumerate(done.recipe.compare):
        progress("compare", index, len(done.recipe.compare))
        other = compress_program(
            source,
            alternative,
            calibration=calibration.tokens if calibration is not None else None,
            seed=options.seed,
            verify=1,
        )
        stored_program: Program = other.program.with_dtype(stored)
        model = to_huggingface(stored_program.with_dtype(source.dtype), source.config, source.generation_config)
        measured[alternative] = Measured(program_cost(stored_program), score(model, held_out))
    progress("compare", 1, 1)
    return measured
