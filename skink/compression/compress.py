"""The main job in memory: a model in, a smaller model out, both Hugging Face models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from skink.errors import CalibrationError
from skink.graph.capture import capture
from skink.graph.passes import Pass
from skink.graph.pipeline import Pipeline, PipelineResult
from skink.graph.program import Program, Stage
from skink.graph.propagate import propagate
from skink.passes.canonicalize import Canonicalize
from skink.passes.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]
RecipeLike = str | Path | Sequence[Pass | str] | Recipe


def _silent(name: str, done: int, total: int) -> None:
    pass


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
    model: "PreTrainedModel",
    recipe: RecipeLike = (),
    *,
    calibration: Tensor | None = None,
    padding: Tensor | None = None,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    verify: int | None = None,
    progress: Progress = _silent,
) -> Compression:
    """Capture a model and run a recipe on it. The model is left as it was.

    Args:
        model: a Hugging Face decoder or encoder.
        recipe: see `skink.passes.recipe.load_recipe`; empty for the model as it is, in Skink's form.
        calibration: token windows int64[N, T].
        padding: int64[N, T], 1 where a window holds text and 0 where padding; None: all is text.
        overrides: `{"low-rank.keep": 0.7}`.
        seed: for anything random.
        verify: 0 to 3, see `SKINK_VERIFY`, which is the default.
        progress: called as (what, done, total).

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
    progress("capture", 0, 1)
    program = captured(model)
    progress("capture", 1, 1)
    canonical = Pipeline((Canonicalize(),)).run(program, seed=seed, verify=verify, progress=progress)
    dense = program.clone()
    # A limit on edits may have cut canonicalize short; then no other pass runs either.
    rest = Pipeline(pipeline.passes[1:] if program.stage >= Stage.CANONICAL else (), start=program.stage)
    result = rest.run(program, calibration=calibration, padding=padding, seed=seed, verify=verify, progress=progress)
    return Compression(program, dense, loaded, PipelineResult(canonical.passes + result.passes))


def captured(model: "PreTrainedModel") -> Program:
    """The model as a program: captured, or, where it is a program in Skink's form already, that one."""
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
    progress: Progress = _silent,
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

    Returns:
        The model, a `SkinkForCausalLM`, or for an encoder what it was: `SkinkModel`, `SkinkForMaskedLM` and so on;
        `model.compression` says what was done.

    Raises:
        SkinkError: see docs/errors.md.
    """
    from skink.compression.texts import TextOptions, calibration_windows, longest_text
    from skink.export.huggingface import load_source, to_huggingface
    from skink.export.huggingface.loading import holds_encoder
    from skink.export.huggingface.sentences import sentence_settings

    settings = None
    if isinstance(model, str | Path):
        name, encoder = model, holds_encoder(model)
        model, tokenizer = load_source(name, encoders=encoder)
        settings = sentence_settings(name) if encoder else None
    windows = calibration if isinstance(calibration, Tensor) else None
    padding = None
    if calibration is not None and windows is None:
        longest = longest_text(model, tokenizer, settings.longest if settings else None)
        found = calibration_windows(
            tokenizer, calibration, TextOptions(), longest=longest, encoder=not model.can_generate()
        )
        windows, padding = found.tokens, found.padding
    done = compress_program(
        model,
        recipe,
        calibration=windows,
        padding=padding,
        overrides=overrides,
        seed=seed,
        verify=verify,
        progress=progress,
    )
    result = to_huggingface(done.program, model.config, getattr(model, "generation_config", None))
    result.compression = done
    return result
