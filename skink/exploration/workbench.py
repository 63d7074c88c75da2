"""One model on the bench: captured once, then compressed in many ways, each measured alike."""

import hashlib
import json
import time
import traceback
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from skink.compression.chosen_texts import ChosenTexts, choose_texts, training_text
from skink.compression.compress import captured
from skink.compression.texts import STANDARD_LIBRARY, HeldOutTexts, known_tokens, longest_text, read_documents
from skink.errors import CalibrationError, SkinkError
from skink.evaluation.harness import check_tasks
from skink.exploration.axes import ModelFacts
from skink.exploration.options import ExploreOptions
from skink.exploration.points import Point
from skink.exploration.qualities import (
    EmbeddingQuality,
    PerplexityQuality,
    Quality,
    ScoresQuality,
    TasksQuality,
    questions_from,
)
from skink.export.huggingface import load_source, save, to_huggingface
from skink.export.huggingface.loading import STDLIB_LLAMA, holds_encoder, stored_dtype
from skink.export.huggingface.sentences import SentenceSettings, sentence_settings
from skink.graph.cost import program_cost
from skink.graph.pipeline import Pipeline, check_training_text
from skink.graph.program import Program
from skink.graph.windows import Windows
from skink.passes.canonicalize import Canonicalize
from skink.passes.recover.asked import check_asked

# Of each weight, so many numbers go into the model's fingerprint.
_FINGERPRINT = 256


class Workbench:
    """A model, the text to work with, and what is measured.

    Args:
        source: a Hugging Face model, left as it is.
        tokenizer: the model's; None where there is none.
        name: for reports.
        options: see `ExploreOptions`.
        stored: dtype of the weights in the checkpoint, which sizes are of; the model's own by default.

    Raises:
        SkinkError: capture, calibration and option errors.
    """

    def __init__(
        self, source: Any, tokenizer: Any, name: str, options: ExploreOptions, *, stored: torch.dtype | None = None
    ) -> None:
        self.source, self.tokenizer, self.name, self.options = source, tokenizer, name, options
        self.stored = stored or source.dtype
        self.encoder = not source.can_generate()
        # How an encoder's checkpoint makes embeddings; the defaults for a model object.
        self.sentences = SentenceSettings()
        self.kinds = options.kinds(encoder=self.encoder)
        # A program in Skink's form is edited in place.
        self.program = captured(source).clone()
        Pipeline((Canonicalize(),)).run(self.program, seed=options.seed, verify=1)
        self.facts = ModelFacts.of(self.program)
        calibration = options.calibration
        self._calibration_text = STANDARD_LIBRARY if calibration is None and name == STDLIB_LLAMA else calibration
        self._training_text = training_text(options.training, calibration, ships=name == STDLIB_LLAMA)
        # How much text points train on, once they are known.
        self._training_tokens = 0
        self._last: tuple[int, ChosenTexts] | None = None

    @classmethod
    def load(cls, name: str, options: ExploreOptions) -> "Workbench":
        """A bench for a checkpoint, by hub id, folder or `stdlib-llama`.

        Raises:
            SkinkError: as the class, and MODEL-001 to -003.
        """
        source, tokenizer = load_source(name, dtype=options.dtype, device=options.device, encoders=holds_encoder(name))
        bench = cls(source, tokenizer, name, options, stored=stored_dtype(name))
        if bench.encoder:
            bench.sentences = sentence_settings(name)
        return bench

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights' names, shapes and dtypes, and of evenly spaced numbers of each."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.program.weights()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
            flat = weight.detach().reshape(-1)
            places = torch.linspace(0, max(len(flat) - 1, 0), min(_FINGERPRINT, len(flat)), dtype=torch.float64)
            digest.update(flat[places.long().to(flat.device)].double().cpu().numpy().astype("<f8").tobytes())
        return digest.hexdigest()

    @cached_property
    def texts(self) -> tuple[Windows | None, Windows | HeldOutTexts | None]:
        """Windows to calibrate on, and text to judge on."""
        found = self._choose(0)
        return found.calibration, found.held_out

    def _choose(self, tokens: int) -> ChosenTexts:
        """All text, with so many tokens of it to train on."""
        return choose_texts(
            self.tokenizer,
            calibration=self._calibration_text,
            held_out=self.options.held_out,
            training=self._training_text,
            options=self.options.texts,
            tokens=tokens,
            training_texts=self.options.training_texts,
            longest=longest_text(self.source, self.tokenizer, self.sentences.longest),
            vocabulary=known_tokens(self.source),
            encoder=self.encoder,
        )

    def _tokens(self, point: Point) -> int:
        """How much text a point trains on."""
        length = self.options.training_texts.length or self.options.texts.length
        return max((entry.training_tokens(length) for entry in point.recipe.passes), default=0)

    def _texts_of(self, point: Point) -> ChosenTexts | None:
        """The text that a point trains on, and what it judges itself by; None where it does not train."""
        tokens = self._tokens(point)
        if not tokens:
            return None
        if self._last is None or self._last[0] != tokens:
            self._last = tokens, self._choose(tokens)
        return self._last[1]

    @cached_property
    def qualities(self) -> dict[str, Quality]:
        """What is measured of quality, ready."""
        return {kind: self._quality(kind) for kind in self.kinds}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that a point's numbers depend on besides model and recipe."""
        calibration = self.texts[0]
        training = {}
        if self._training_tokens:
            text = self._choose(1).training
            training = {"training": None if text is None else [text.source, text.sha256, text.tokens.shape[1]]}
        return training | {
            "calibration": None
            if calibration is None
            else {
                "text": calibration.source,
                "sha256": calibration.sha256,
                "windows": calibration.tokens.shape[0],
                "length": calibration.tokens.shape[1],
            },
            "quality": {kind: dict(quality.settings) for kind, quality in self.qualities.items()},
            "dtype": str(self.source.dtype).removeprefix("torch."),
            "stored": str(self.stored).removeprefix("torch."),
            "device": str(torch.device(self.options.device)),
            "seed": self.options.seed,
        }

    def refuse(self, points: tuple[Point, ...]) -> None:
        """Refuse points that cannot run here, before any does.

        Raises:
            CalibrationError: CALIBRATION-002 where there is no text to calibrate on, or none to judge on.
            RecoveryError: RECOVER-005 where there is none to train on, -009 where there is and nothing trains.
        """
        needing = [point for point in points if any(entry.needs_calibration for entry in point.recipe.passes)]
        if needing and self.texts[0] is None:
            raise CalibrationError(
                "CALIBRATION-002",
                f"the recipe {str(needing[0].recipe)!r} needs calibration text, and none was given.",
                fix="give --calibration FILES, or --calibration stdlib for Python source (in Python calibration=...).",
            )
        passes = [entry for point in points for entry in point.recipe.passes]
        check_asked(passes, text=self.options.training is not None, cut=self.options.training_texts.said)
        check_training_text(passes, given=self._training_text is not None)
        self._training_tokens = max(map(self._tokens, points), default=0)
        # Made here, so that what they raise comes before any point.
        _ = self.qualities

    def compress(self, point: Point) -> tuple[Program, dict[str, Any]]:
        """The point's program, and what its passes said: predicted loss in nats per token where all layers have one.

        Raises:
            SkinkError: what passes raise.
        """
        program = self.program.clone()
        calibration = self.texts[0]
        learnt = self._texts_of(point)
        begin = time.monotonic()
        with torch.random.fork_rng():
            torch.manual_seed(self.options.seed)
            result = Pipeline(point.recipe.passes, start=program.stage).run(
                program,
                calibration=None if calibration is None else calibration.tokens,
                padding=None if calibration is None else calibration.padding,
                seed=self.options.seed,
                verify=1,
                training=None if learnt is None else learnt.training,
                held_out=None if learnt is None else learnt.judged,
            )
        losses = [getattr(layer, "predicted_loss", None) for layer in result.layers if layer.decision != "kept dense"]
        known = [loss for loss in losses if loss is not None]
        return program, {
            "seconds": time.monotonic() - begin,
            "layers_changed": len(losses),
            "predicted_loss": sum(known) if known and len(known) == len(losses) else None,
        }

    def model(self, program: Program) -> Any:
        """A program as a Hugging Face model, with weights as they would be stored."""
        stored = program.with_dtype(self.stored).with_dtype(self.source.dtype)
        return to_huggingface(stored, self.source.config, getattr(self.source, "generation_config", None))

    def run(self, point: Point, folder: Path | None = None) -> dict[str, Any]:
        """Make a point and measure its size and quality; what fails is recorded, and raises nothing.

        Args:
            point: what to make.
            folder: where to leave the compressed model, for its speed to be measured later; None for nowhere.

        Returns:
            The record: `metrics` and `details`, or `error`.
        """
        try:
            program, details = self.compress(point)
            cost = program_cost(program.with_dtype(self.stored))
            sizes = {
                name: getattr(cost, name) for name in ("parameters", "linear_parameters", "bytes", "macs_per_token")
            }
            metrics: dict[str, float] = dict(sizes)
            model = self.model(program)
            begin = time.monotonic()
            for kind, quality in self.qualities.items():
                values, found = quality(model)
                metrics |= values
                details[kind] = found
            details["measure_seconds"] = time.monotonic() - begin
            if folder is not None:
                save(
                    program.with_dtype(self.stored),
                    self.source.config,
                    getattr(self.source, "generation_config", None),
                    None,
                    folder,
                )
        except SkinkError as error:
            return {"error": error.as_json()}
        # A pass of another package may raise anything, and must not stop the other points.
        except Exception as error:
            what = f"{type(error).__name__}: {error}".strip()
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            why = " <- ".join(
                f"{frame.name} ({Path(frame.filename).name}:{frame.lineno})" for frame in reversed(frames)
            )
            return {"error": SkinkError("DEFECT-001", what, where=point.text, why=why).as_json()}
        return {"metrics": metrics, "details": details}

    def _quality(self, kind: str) -> Quality:
        held_out = self.texts[1]
        if kind == "questions":
            text = self.options.held_out
            documents = None if text is None else read_documents(text, split="held-out")
            return questions_from(documents, self._needed_tokenizer(), self.options.questions, self.options.seed)
        if kind == "tasks":
            check_tasks(self.options.tasks)
            return TasksQuality(self.options.tasks, self.options.task_limit, self._needed_tokenizer())
        if isinstance(held_out, HeldOutTexts) and self.program.outputs[0] != "last_hidden_state":
            return ScoresQuality(held_out, self.model(self.program))
        if isinstance(held_out, HeldOutTexts):
            return EmbeddingQuality(held_out, self.sentences.pooling, self.model(self.program))
        if held_out is None:
            raise CalibrationError(
                "CALIBRATION-002",
                f"the quality {kind!r} needs held-out text, and none was given.",
                fix="give --held-out FILES, or --held-out stdlib.",
            )
        return PerplexityQuality(held_out)

    def _needed_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise CalibrationError(
                "CALIBRATION-002",
                "questions and tasks are text, and there is no tokenizer to read it with.",
                fix="put tokenizer.json beside the checkpoint; in Python pass tokenizer=.",
            )
        return self.tokenizer


def point_key(fingerprint: str, settings: Mapping[str, Any], versions: Mapping[str, str], point: Point) -> str:
    """What a point's numbers depend on, as SHA-256: equal keys, equal numbers (to rounding)."""
    content = [fingerprint, settings, {name: versions[name] for name in sorted(versions)}, point.text]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
