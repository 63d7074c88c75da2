"""Every form of one model beside the others: the source, what was captured, and what became of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skink.compression.compress import Compression, Progress, compress_program
from skink.compression.layer_losses import layer_losses
from skink.compression.measure import DENSE, RESULT, RUNTIME, SOURCE, Measured, score
from skink.compression.quality import encoder_loss, encoder_quality
from skink.compression.texts import HeldOutTexts
from skink.evaluation import GenerationTarget, HuggingFaceTarget, Speed, Spread, measure_generation
from skink.evaluation.linear_speed import measure_linear
from skink.export.huggingface import load, to_huggingface
from skink.export.huggingface.sentences import SentenceSettings
from skink.graph.cost import program_cost
from skink.graph.program import Program
from skink.graph.progress import silent
from skink.graph.windows import Windows
from skink.passes.recipe import parse_passes
from skink.settings import settings
from skink.training.loop.processes import wait_for_all

if TYPE_CHECKING:
    from skink.compression.folder import CompressOptions


@dataclass(frozen=True)
class Job:
    """What measuring needs to know of one compression; of text to train on and to judge by, and of a teacher, where the
    recipe or what it is compared with trains."""

    done: Compression
    source: Any
    folder: Path
    stored: torch.dtype
    calibration: Windows | None
    options: "CompressOptions"
    progress: Progress
    training: Windows | None = None
    judged: Windows | None = None
    teacher: Program | None = None
    status: Callable[[str], None] = silent


def _sizes(job: Job) -> dict[str, Measured]:
    """Every form's size."""
    dense = Measured(program_cost(job.done.dense.with_dtype(job.stored)))
    return {SOURCE: dense, DENSE: dense, RESULT: Measured(program_cost(job.done.program.with_dtype(job.stored)))}


def _models(job: Job) -> dict[str, Any]:
    """Every form, to be run. What is measured is what was written."""
    return {
        SOURCE: job.source,
        DENSE: _in_our_form(job, job.done.dense),
        RESULT: load(job.folder, device=job.options.device, dtype=job.options.dtype),
    }


def _in_our_form(job: Job, program: Program) -> Any:
    return to_huggingface(program, job.source.config, getattr(job.source, "generation_config", None))


def measure_encoder(job: Job, held_out: HeldOutTexts | None, settings: SentenceSettings) -> dict[str, Measured]:
    """Every form's size, and its quality where that is wanted; the recipe's alternatives are further forms."""
    forms = _sizes(job)
    if held_out is None or not job.options.evaluate:
        return forms
    models = _models(job)
    for name, program in alternatives(job):
        models[name] = _in_our_form(job, program.with_dtype(job.source.dtype))
        forms[name] = Measured(program_cost(program))
    job.progress("quality", 0, 1)
    found = encoder_quality(models, held_out, settings.pooling, job.done.program.outputs)
    job.progress("quality", 1, 1)
    return {name: replace(form, quality=found[name]) for name, form in forms.items()}


def measure_decoder(job: Job, held_out: Windows | None, runtime: GenerationTarget[Any] | None) -> dict[str, Measured]:
    """Every form's size; its perplexity and speed too where that is wanted."""
    forms, options, progress = _sizes(job), job.options, job.progress
    if not options.evaluate:
        return forms
    models = _models(job)
    if held_out is not None:
        for index, (form, model) in enumerate(models.items()):
            progress("perplexity", index, len(models))
            forms[form] = replace(forms[form], perplexity=score(model, held_out))
        progress("perplexity", len(models), len(models))
    targets: dict[str, GenerationTarget[Any]] = {form: HuggingFaceTarget(model) for form, model in models.items()}
    if runtime is not None:
        targets[RUNTIME] = runtime
        forms[RUNTIME] = Measured(program_cost(job.done.program))
    longest = getattr(job.source.config, "max_position_embeddings", None) or 1 << 30
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
    linear = _linear_seconds(job, speeds[RESULT])
    return {
        form: replace(measured, speed=speeds[form], linear_seconds=linear.get(form)) for form, measured in forms.items()
    }


def _linear_seconds(job: Job, speed: Speed) -> dict[str, Spread]:
    """What the linear layers alone take for the same workload, before and after."""
    programs = {DENSE: job.done.dense, RESULT: job.done.program}
    return measure_linear(
        {form: program.with_dtype(job.source.dtype) for form, program in programs.items()},
        batch=speed.batch,
        prompt=speed.prompt,
        output=speed.new_tokens,
        rounds=speed.rounds,
        seed=speed.seed,
        progress=lambda done_rounds, total: job.progress("speed of linear layers", done_rounds, total),
    )


def measure_layers(job: Job, held_out: Windows | HeldOutTexts | None) -> dict[str, float]:
    """What each factored layer alone adds to the loss on held-out text, where that is wanted."""
    if not job.options.evaluate or not job.options.measure_layers or held_out is None:
        return {}
    # To compare with; a decoder is measured by itself.
    source = _in_our_form(job, job.done.dense) if isinstance(held_out, HeldOutTexts) else None

    def loss(program: Program) -> float:
        model = _in_our_form(job, program)
        if isinstance(held_out, HeldOutTexts):
            return encoder_loss(source, model, held_out, program.outputs)
        return score(model, held_out).nats_per_token

    return layer_losses(
        job.done.dense,
        job.done.program,
        job.done.result.layers,
        loss,
        progress=lambda done, total: job.progress("layers", done, total),
    )


def compare(job: Job, held_out: Windows | None) -> dict[str, Measured]:
    """Perplexity of the recipe's alternatives, on the same text."""
    if not job.options.evaluate or held_out is None:
        return {}
    return {
        name: Measured(program_cost(program), score(_in_our_form(job, program.with_dtype(job.source.dtype)), held_out))
        for name, program in alternatives(job)
    }


def alternatives(job: Job) -> Iterator[tuple[str, Program]]:
    """What the recipe's alternatives make of the source, in the dtype that is stored, one at a time.

    Of several processes the first makes them all, and the others those that they train together.
    """
    recipes, calibration = job.done.recipe.compare, job.calibration
    for index, alternative in enumerate(recipes):
        job.progress("compare", index, len(recipes))
        if any(entry.training_tokens(2) for entry in parse_passes(alternative)):
            # The first process has been measuring until now.
            wait_for_all(job.options.device)
        elif not settings().main_process:
            continue
        other = compress_program(
            job.done.dense,
            alternative,
            calibration=calibration.tokens if calibration is not None else None,
            padding=calibration.padding if calibration is not None else None,
            seed=job.options.seed,
            verify=1,
            training=job.training,
            held_out=job.judged,
            teacher=job.teacher,
            checkpoints=job.options.checkpoints,
            status=job.status,
        )
        yield alternative, other.program.with_dtype(job.stored)
    job.progress("compare", 1, 1)
