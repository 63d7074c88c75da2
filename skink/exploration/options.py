"""What an exploration can be told besides model and space."""

from dataclasses import dataclass, field
from typing import Any

from skink.compression import SpeedOptions, TextOptions, TrainingTextOptions
from skink.compression.texts import TextLike
from skink.errors import OptionError, check_range, suggest

QUALITY_KINDS = ("perplexity", "questions", "tasks", "embedding")


@dataclass(frozen=True)
class ExploreOptions:
    """How points are made and measured.

    Args:
        calibration: files, folders or the word `stdlib`; the model that ships has `stdlib` by default.
        held_out: text to judge on; a part of the calibration text that calibration does not see by default.
        texts: how text is cut.
        quality: what is measured of quality: `perplexity`, `questions`, `tasks`, `embedding`. Empty: perplexity and
            questions for a decoder, embedding for an encoder.
        questions: multiple-choice questions of each kind.
        tasks: names of lm-eval tasks, for the quality `tasks`.
        task_limit: documents of each task; None for all.
        latency: measure generation, one point at a time, in turn with the dense model.
        speed: the workload for that.
        jobs: processes that compress and measure quality side by side.
        max_points: at most so many points, drawn by the seed.
        retry: run points again that failed before.
        dtype: of the weights while working; `auto` is float32 on the CPU for weights stored in half precision.
        device: where to work.
        seed: for anything random.
        training: text to train on, for points whose recipe trains; as in `skink.compress`.
        training_texts: how that is read and cut.

    Raises:
        OptionError: OPTION-002.
    """

    calibration: TextLike | None = None
    held_out: TextLike | None = None
    texts: TextOptions = field(default_factory=TextOptions)
    quality: tuple[str, ...] = ()
    questions: int = 100
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    latency: bool = True
    speed: SpeedOptions = field(default_factory=lambda: SpeedOptions(prompt=32, new_tokens=32, rounds=5))
    jobs: int = 1
    max_points: int | None = None
    retry: bool = False
    dtype: str = "auto"
    device: str = "cpu"
    seed: int = 0
    training: Any = None
    training_texts: TrainingTextOptions = field(default_factory=TrainingTextOptions)

    def __post_init__(self) -> None:
        check_range("jobs", self.jobs, low=1, high=4096)
        check_range("questions", self.questions, low=1, high=2**31)
        if self.max_points is not None:
            check_range("max_points", self.max_points, low=1, high=2**31)
        for kind in self.quality:
            if kind not in QUALITY_KINDS:
                raise OptionError(
                    "OPTION-002", f"quality={kind!r} is nothing to measure.", fix=suggest(kind, QUALITY_KINDS)
                )
        if ("tasks" in self.quality) != bool(self.tasks):
            raise OptionError(
                "OPTION-002",
                f"quality={list(self.quality)} with tasks={list(self.tasks)}: one asks for the other.",
                fix="name lm-eval tasks, and tasks among the qualities.",
            )

    def kinds(self, *, encoder: bool) -> tuple[str, ...]:
        """What to measure of quality.

        Raises:
            OptionError: OPTION-002 for a quality that a model of this sort has not.
        """
        chosen = self.quality or (("embedding",) if encoder else ("perplexity", "questions"))
        for kind in chosen:
            if (kind == "embedding") != encoder:
                raise OptionError(
                    "OPTION-002",
                    f"quality={kind!r} is not for {'an encoder' if encoder else 'a decoder'}.",
                    fix="choose embedding." if encoder else "choose perplexity, questions or tasks.",
                )
        return chosen

    def workload(self) -> dict[str, Any]:
        """The workload of latency."""
        return {name: getattr(self.speed, name) for name in ("batch", "prompt", "new_tokens", "rounds")}
