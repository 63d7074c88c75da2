"""The model that low_rank.py measures: captured once, with the texts to calibrate and to judge on."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from skink.compression.compress import captured
from skink.compression.texts import (
    HeldOutTexts,
    TextOptions,
    calibration_and_held_out,
    encoder_texts,
    longest_text,
    read_documents,
)
from skink.evaluation import multiple_choice
from skink.evaluation.questions import KINDS
from skink.export.huggingface import load_source, to_huggingface
from skink.export.huggingface.loading import holds_encoder
from skink.export.huggingface.sentences import sentence_settings
from skink.graph.calibration import stream_covariances
from skink.graph.gradients import stream_moments
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.graph.windows import Windows
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose.selection import linear_layers


@dataclass(frozen=True)
class Subject:
    """The model, captured once, and what it is measured with."""

    name: str
    source: Any
    dense: Program
    calibration: Windows
    held_out: Windows | HeldOutTexts
    questions: tuple[Any, ...]
    pooling: Any

    @property
    def settings(self) -> dict[str, str]:
        """What a row depends on besides its recipe."""
        calibration, held_out = self.calibration, self.held_out
        shape = " x ".join(map(str, calibration.tokens.shape))
        judged = (
            f"{held_out.source}, {held_out.sha256[:12]}, {' x '.join(map(str, held_out.tokens.shape))} tokens"
            if isinstance(held_out, Windows)
            else f"{held_out.source}, {held_out.sha256[:12]}, {len(held_out.texts.mask)} texts"
        )
        return {
            "model": Path(self.name).name,
            "calibration": f"{calibration.source}, {calibration.sha256[:12]}, {shape} tokens",
            "held out": judged,
            "questions": ", ".join(f"{len(each)} {each.kind} ({each.sha256[:12]})" for each in self.questions)
            or "none",
            "dtype": str(self.dense.dtype).removeprefix("torch."),
            "torch": version("torch"),
        }

    def model(self, program: Program) -> Any:
        """A program as what transformers runs."""
        config, generation = self.source.config, getattr(self.source, "generation_config", None)
        return to_huggingface(program, config, generation, copy=False)


def load(name: str, questions: int, text: str) -> Subject:
    """Load, capture and canonicalise a model, and cut its texts."""
    encoder = holds_encoder(name)
    source, tokenizer = load_source(name, encoders=encoder)
    settings = sentence_settings(name) if encoder else None
    longest = longest_text(source, tokenizer, settings.longest if settings else None)
    calibration: Windows | None
    held_out: Windows | HeldOutTexts | None
    calibration, held_out = (encoder_texts if encoder else calibration_and_held_out)(
        tokenizer, text, None, TextOptions(), longest=longest
    )
    if tokenizer is None or calibration is None or held_out is None:
        raise SystemExit(f"{name} has no tokenizer, or {text} no text to read")
    dense = captured(source)
    Pipeline((Canonicalize(),)).run(dense, verify=0)
    asked = []
    if questions and not encoder:
        documents = read_documents(text, split="held-out")
        asked = [multiple_choice(kind, documents, tokenizer, questions) for kind in KINDS]
    return Subject(name, source, dense, calibration, held_out, tuple(asked), settings.pooling if settings else None)


@contextmanager
def statistics_once(subject: Subject) -> Iterator[None]:
    """Statistics of the dense model are gathered once, and given again to every pass that asks for them.

    They take most of a row's time, and are the same in each. Passes import the two functions by name; so every module
    that did is given others meanwhile.
    """
    real: dict[str, Callable[..., Any]] = {"stream_moments": stream_moments, "stream_covariances": stream_covariances}
    known: dict[str, list[dict[str, Any]]] = {}

    def once(
        name: str, program: Program, windows: torch.Tensor, names: Any, **options: Any
    ) -> Iterator[dict[str, Any]]:
        progress = options.pop("progress", None)
        if len(program.edits) != len(subject.dense.edits) or options.get("follow_edits"):
            yield from real[name](program, windows, names, progress=progress, **options)
            return
        usual = inspect.signature(real[name]).parameters
        unusual = {option: value for option, value in options.items() if value is not usual[option].default}
        key = f"{name} {sorted((option, str(value)) for option, value in unusual.items())}"
        if key not in known:
            every = [layer.weight for layer in linear_layers(subject.dense)]
            known[key] = list(real[name](subject.dense, windows, every, progress=progress, **options))
        for group in known[key]:
            if asked := {weight: found for weight, found in group.items() if weight in set(names)}:
                yield asked

    with ExitStack() as stack:
        for module in [module for name, module in sys.modules.items() if name.startswith("skink.passes.")]:
            for name in real.keys() & vars(module).keys():
                stack.enter_context(patch.object(module, name, partial(once, name)))
        yield
