"""The main job in memory: a model in, a smaller model out, both Hugging Face models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from skink.compression.text_options import TextOptions, TrainingTextOptions
from skink.errors import CalibrationError
from skink.graph.capture import capture
from skink.graph.passes import Pass
from skink.graph.pipeline import Pipeline, PipelineResult, check_training_text
from skink.graph.program import Program, Stage
from skink.graph.progress import silent
from skink.graph.propagate import propagate
from skink.graph.windows import Windows
from skink.passes.canonicalize import Canonicalize
from skink.passes.recipe import Recipe, load_recipe
from skink.passes.recover.asked import check_asked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]
RecipeLike = str | Path | Sequence[Pass | str] | Recipe


@dataclass(frozen=True)
class Compression:
    """A compressed program, the one it came from, and what was done.

    Args:
        program: the result.
        dense: the captured model in canonical form, with the same weights where nothing was rewritten.
        recipe: with every override applied.
        result: of the pipeline.
    """

    program: Program
    dense: Program
    recipe: Recipe
    result: PipelineResult


def compress_program(
    model: "PreTrainedModel | Program",
    recipe: RecipeLike = (),
    *,
    calibration: Tensor | None = None,
    padding: Tensor | None = None,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    verify: int | None = None,
    progress: Progress = silent,
    training: Windows | None = None,
    held_out: Windows | None = None,
    teacher: "PreTrainedModel | Program | None" = None,
    checkpoints: Path | None = None,
    status: Callable[[str], None] = silent,
) -> Compression:
    """Capture a model and run a recipe on it. The model is left as it was.

    Args:
        model: a Hugging Face decoder or encoder, or what was captured of one, in canonical form.
        recipe: see `skink.passes.recipe.load_recipe`; empty for the model as it is, in Skink's form.
        calibration: token windows int64[N, T].
        padding: int64[N, T], 1 where a window holds text and 0 where padding; None: all is text.
        overrides: `{"low-rank.keep": 0.7}`.
        seed: for anything random.
        verify: 0 to 3, see `SKINK_VERIFY`, which is the default.
        progress: called as (what, done, total).
        training: text to train on, for passes that do.
        held_out: text that such passes may judge by.
        teacher: what such passes learn from, a model or a program in canonical form; by default `model` itself.
        checkpoints: folder where such passes keep their work, to go on from when the same is asked for again.
        status: told now and then what such a pass is at.

    Raises:
        SkinkError: capture, recipe, option, calibration and verification errors; see docs/errors.md.
    """
    loaded = load_recipe(recipe, overrides)
    pipeline = Pipeline((Canonicalize(), *loaded.passes))
    if any(entry.needs_calibration for entry in loaded.passes) and calibration is None:
        raise CalibrationError(
            "CALIBRATION-002",
            f"the recipe {str(loaded)!r} needs calibration text, and none was given.",
            fix="give --calibration FILES, or --calibration stdlib for Python source (in Python calibration=...).",
        )
    check_training_text(loaded.passes, given=training is not None)
    progress("capture", 0, 1)
    program = captured(model)
    progress("capture", 1, 1)
    canonical = Pipeline((Canonicalize(),)).run(program, seed=seed, verify=verify, progress=progress)
    dense = program.clone()
    # A limit on edits may have cut canonicalize short; then no other pass runs either.
    rest = Pipeline(pipeline.passes[1:] if program.stage >= Stage.CANONICAL else (), start=program.stage)
    original = dense
    if teacher is not None and any(entry.needs_original for entry in loaded.passes):
        original = teacher if isinstance(teacher, Program) else canonical_program(teacher, seed=seed)
    if program.stage >= Stage.CANONICAL:
        for entry in loaded.everything:
            entry.check_start(program, original)
    result = rest.run(
        program,
        calibration=calibration,
        padding=padding,
        seed=seed,
        verify=verify,
        progress=progress,
        training=training,
        held_out=held_out,
        original=original,
        checkpoints=checkpoints,
        status=status,
    )
    return Compression(program, dense, loaded, PipelineResult(canonical.passes + result.passes))


def canonical_program(model: "PreTrainedModel", *, seed: int = 0) -> Program:
    """A model in canonical form; the model is left as it was."""
    program = captured(model).clone()
    Pipeline((Canonicalize(),)).run(program, seed=seed, verify=1)
    return program


def captured(model: "PreTrainedModel | Program") -> Program:
    """The model as a program: captured, or, where it is a program in Skink's form already, that one."""
    if isinstance(model, Program):
        return model.clone()
    from skink.export.huggingface.base import SkinkPreTrainedModel

    if isinstance(model, SkinkPreTrainedModel):
        program = model.program
        propagate(program)
        return program
    program = capture(model)
    program.origin |= {"model_type": model.config.model_type}
    return program


def compress(
    model: "PreTrainedModel | str | Path",
    recipe: RecipeLike = (),
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    verify: int | None = None,
    progress: Progress = silent,
    training: Any = None,
    training_texts: TrainingTextOptions | None = None,
    held_out: Any = None,
    teacher: "PreTrainedModel | str | Path | None" = None,
    checkpoints: str | Path | None = None,
    status: Callable[[str], None] = silent,
) -> Any:
    """A smaller model that runs, trains, saves and loads like any Hugging Face model.

    Args:
        model: a Hugging Face decoder or encoder, or a hub id or folder of one. A model object is left as it was.
        recipe: a YAML file, the name of a recipe that ships, one-line text, or passes. `[]` gives the same model back
            in Skink's form.
        calibration: token windows int64[N, T] that are all text; or, with a tokenizer, files, folders, `Documents` or
            `"stdlib"`, of which an encoder reads each passage by itself.
        tokenizer: for calibration text; loaded with the model where `model` is a name.
        overrides: options to change, `{"low-rank.keep": 0.7}`.
        seed: for anything random.
        verify: 0 to 3, see `SKINK_VERIFY`, which is the default.
        progress: called as (what, done, total).
        training: text to train on, for passes that do: whatever `training_windows` takes (files, folders, `"stdlib"`,
            `datasets` objects, iterables of strings, tokens). By default the calibration text where that is text.
        training_texts: how it is read and cut; by default in windows of 512 tokens.
        held_out: text to judge on while training; a part of the other text, kept back from it, by default.
        teacher: a model, hub id or folder to learn from; by default `model` itself.
        checkpoints: folder where such passes keep their work: the same call again goes on from there.
        status: told now and then what such a pass is at.

    Returns:
        The model, a `SkinkForCausalLM`, or for an encoder what it was: `SkinkModel`, `SkinkForMaskedLM` and so on;
        `model.compression` says what was done.

    Raises:
        SkinkError: see docs/errors.md.
    """
    from skink.compression.chosen_texts import choose_texts, training_text
    from skink.compression.texts import known_tokens, longest_text
    from skink.export.huggingface import load_source, to_huggingface
    from skink.export.huggingface.loading import STDLIB_LLAMA, holds_encoder
    from skink.export.huggingface.sentences import sentence_settings

    loaded = load_recipe(recipe, overrides)
    options, training_texts = TextOptions(), training_texts or TrainingTextOptions()
    check_asked(
        loaded.passes,
        text=training is not None,
        cut=training_texts.said,
        checkpoints=checkpoints is not None,
        teacher=teacher is not None,
    )
    length = training_texts.length or options.length
    tokens = max((entry.training_tokens(length) for entry in loaded.passes), default=0)
    training = training_text(training, calibration, ships=model == STDLIB_LLAMA)
    check_training_text(loaded.passes, given=training is not None)
    settings = None
    if isinstance(model, str | Path):
        name, encoder = model, holds_encoder(model)
        model, tokenizer = load_source(name, encoders=encoder)
        settings = sentence_settings(name) if encoder else None
    encoder = not model.can_generate()
    given = calibration if isinstance(calibration, Tensor) else None
    texts = choose_texts(
        tokenizer,
        calibration=None if given is not None else calibration,
        held_out=held_out,
        training=training,
        options=options,
        tokens=tokens,
        training_texts=training_texts,
        longest=longest_text(model, tokenizer, settings.longest if settings else None),
        vocabulary=known_tokens(model),
        encoder=encoder,
    )
    found = texts.calibration
    if isinstance(teacher, str | Path):
        teacher, _ = load_source(teacher, encoders=encoder)
    done = compress_program(
        model,
        loaded,
        calibration=given if found is None else found.tokens,
        padding=None if found is None else found.padding,
        seed=seed,
        verify=verify,
        progress=progress,
        training=texts.training,
        held_out=texts.judged,
        teacher=teacher,
        checkpoints=None if checkpoints is None else Path(checkpoints),
        status=status,
    )
    result = to_huggingface(done.program, model.config, getattr(model, "generation_config", None))
    result.compression = done
    return result
