"""What is measured of a model's quality: each kind takes a model and gives numbers; a kind is a line in `quality`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from skink.compression.texts import HeldOutTexts
from skink.errors import CalibrationError
from skink.evaluation import answer, multiple_choice, perplexity, standard_library
from skink.evaluation.corpus import Documents, Tokenizer
from skink.evaluation.embeddings import Pooling, agreement, closeness, embed, order, retrieval
from skink.evaluation.harness import run_tasks
from skink.evaluation.questions import KINDS, Questions
from skink.graph.windows import Windows

# The metrics, each a number by its name in `skink.exploration.result.QUALITIES`, and what they were made of.
Measurement = tuple[dict[str, float], dict[str, Any]]


class Quality(Protocol):
    """A kind of quality, ready to be measured."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that the numbers depend on besides the model, as plain JSON values."""

    def __call__(self, model: Any) -> Measurement:
        """Measure a Hugging Face model, or one of ours."""


@dataclass(frozen=True)
class PerplexityQuality:
    """Perplexity on held-out windows."""

    windows: Windows

    @property
    def settings(self) -> Mapping[str, Any]:
        count, length = self.windows.tokens.shape
        return {"text": self.windows.source, "sha256": self.windows.sha256, "windows": count, "length": length}

    def __call__(self, model: Any) -> Measurement:
        found = perplexity(model, self.windows.tokens)
        return {"perplexity": found.value}, {"nats_per_token": found.nats_per_token, "tokens": found.tokens}


@dataclass(frozen=True)
class QuestionsQuality:
    """Accuracy on multiple-choice questions of every kind together."""

    questions: tuple[Questions, ...]

    @property
    def settings(self) -> Mapping[str, Any]:
        return {
            each.kind: {"questions": len(each), "sha256": each.sha256, "text": each.source, "seed": each.seed}
            for each in self.questions
        }

    def __call__(self, model: Any) -> Measurement:
        found = [answer(model, each) for each in self.questions]
        correct = [right for each in found for right in each.correct]
        details = {
            each.kind: {
                "accuracy": each.value,
                "standard_error": each.standard_error,
                "n": each.n,
                # One mark a question, so that any two points can be compared question by question.
                "correct": "".join("1" if right else "0" for right in each.correct),
            }
            for each in found
        }
        return {"accuracy": sum(correct) / len(correct)}, details


@dataclass(frozen=True)
class TasksQuality:
    """Mean accuracy on lm-eval tasks."""

    tasks: tuple[str, ...]
    limit: int | None
    tokenizer: Any

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"tasks": list(self.tasks), "limit": self.limit}

    def __call__(self, model: Any) -> Measurement:
        found = run_tasks(model, self.tokenizer, self.tasks, limit=self.limit)
        mean = sum(task.accuracy for task in found) / len(found)
        return {"tasks": mean}, {task.name: asdict(task) for task in found}


@dataclass(frozen=True)
class EmbeddingQuality:
    """How alike an encoder's embeddings, and what they find, are to those of the dense model."""

    texts: HeldOutTexts
    pooling: Pooling
    dense: Any

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"text": self.texts.source, "sha256": self.texts.sha256, **asdict(self.pooling)}

    def __call__(self, model: Any) -> Measurement:
        sets = (self.texts.texts, self.texts.queries, self.texts.passages)
        before = [embed(self.dense, each, self.pooling) for each in sets]
        after = [embed(model, each, self.pooling) for each in sets]
        near, alike = closeness(before[0], after[0]), order(*before[1:], *after[1:])
        found = retrieval(*after[1:])
        metrics = {"cosine": near.mean, "order": alike.spearman}
        return metrics, {"closeness": asdict(near), "order": asdict(alike), "retrieval": asdict(found)}


@dataclass(frozen=True)
class ScoresQuality:
    """How often the head of an encoder puts the same first as the dense model's does."""

    texts: HeldOutTexts
    dense: Any

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"text": self.texts.source, "sha256": self.texts.sha256}

    def __call__(self, model: Any) -> Measurement:
        found = agreement(self.dense, model, self.texts.texts)
        return {"same": found.same}, asdict(found)


def questions_from(documents: Documents | None, tokenizer: Tokenizer, count: int, seed: int) -> QuestionsQuality:
    """Questions of every kind that a text gives, `count` of each.

    Args:
        documents: held-out text; by default the standard library's held-out part.
        tokenizer: the model's.
        count: of each kind.
        seed: see `multiple_choice`.

    Raises:
        CalibrationError: CALIBRATION-001 where the text gives no question of any kind.
    """
    text = documents or standard_library("held-out")
    made: list[Questions] = []
    refused: CalibrationError | None = None
    for kind in KINDS:
        try:
            made.append(multiple_choice(kind, text, tokenizer, count, seed))
        except CalibrationError as error:
            # Prose has next lines, and assigns to nothing.
            refused = error
    if not made and refused is not None:
        raise refused
    return QuestionsQuality(tuple(made))
