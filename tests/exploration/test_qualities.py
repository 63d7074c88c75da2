import dataclasses
from types import SimpleNamespace

import pytest
import torch

from skink.compression.texts import HeldOutTexts
from skink.errors import CalibrationError
from skink.evaluation import Documents, answer, perplexity
from skink.evaluation.embeddings import Pooling, Texts
from skink.evaluation.harness import TaskScore
from skink.exploration import qualities
from skink.exploration.qualities import (
    EmbeddingQuality,
    PerplexityQuality,
    QuestionsQuality,
    TasksQuality,
    questions_from,
)
from skink.graph.windows import Windows


def test_perplexity(llama):
    windows = Windows(torch.arange(64).view(2, 32), "text", "a" * 64)
    metrics, details = PerplexityQuality(windows)(llama)
    expected = perplexity(llama, windows.tokens)
    assert metrics == {"perplexity": expected.value}
    assert details["tokens"] == 62
    assert PerplexityQuality(windows).settings == {"text": "text", "sha256": "a" * 64, "windows": 2, "length": 32}


def test_questions_of_every_kind_count_alike(llama, tokenizer, options):
    found = questions_from(options.held_out, tokenizer, 5, 0)
    assert set(found.settings) == {"next-line", "assigned-name"}
    metrics, details = found(llama)
    answers = [answer(llama, each) for each in found.questions]
    assert metrics["accuracy"] == sum(sum(each.correct) for each in answers) / sum(each.n for each in answers)
    for each in answers:
        assert details[each.kind]["correct"] == "".join("01"[right] for right in each.correct)


def test_prose_has_next_lines_alone(tokenizer):
    words = ["alpha", "beta", "gamma", "delta", "omega", "kappa", "sigma", "theta", "iota", "zeta"]
    text = "\n".join(f"The {word} of {other} is near." for word in words for other in words)
    found = questions_from(Documents("prose", (text,)), tokenizer, 3, 0)
    assert [each.kind for each in found.questions] == ["next-line"]
    with pytest.raises(CalibrationError, match="no question"):
        questions_from(Documents("nothing", ("x",)), tokenizer, 3, 0)


def test_tasks(monkeypatch):
    scores = tuple(TaskScore(name, "acc", value, 0.1, 3, "1") for name, value in (("one", 0.25), ("two", 0.75)))
    asked = []
    monkeypatch.setattr(qualities, "run_tasks", lambda *given, limit: asked.append((given, limit)) or scores)
    metrics, details = TasksQuality(("one", "two"), 7, "tokenizer")("model")
    assert metrics == {"tasks": 0.5}
    assert asked == [(("model", "tokenizer", ("one", "two")), 7)]
    assert details["two"] == dataclasses.asdict(scores[1])


class Encoder(torch.nn.Module):
    """Embeds by a table, turned a little."""

    def __init__(self, noise):
        super().__init__()
        torch.manual_seed(1)
        self.table = torch.nn.Parameter(torch.randn(50, 8))
        self.noise = noise

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(last_hidden_state=self.table[input_ids] + self.noise * self.table[input_ids].roll(1, -1))


def test_embeddings_are_compared_with_the_dense_model_s():
    def texts():
        return Texts(torch.randint(0, 50, (6, 5)), torch.ones(6, 5, dtype=torch.int64))

    held_out = HeldOutTexts(texts(), texts(), texts(), "text", "b" * 64)
    quality = EmbeddingQuality(held_out, Pooling(), Encoder(0.0))
    same, _ = quality(Encoder(0.0))
    other, details = quality(Encoder(0.8))
    assert same == pytest.approx({"cosine": 1.0, "order": 1.0})
    assert other["cosine"] < 0.95
    assert details["closeness"]["texts"] == 6
    assert quality.settings["sha256"] == "b" * 64


def test_settings_are_plain(tokenizer, options):
    import json

    found = questions_from(options.held_out, tokenizer, 2, 0)
    assert isinstance(found, QuestionsQuality)
    assert json.loads(json.dumps(dict(found.settings))) == found.settings
