"""Measures of encoders: what is compared, and with whom."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from skink.compression.quality import encoder_loss, encoder_quality
from skink.compression.texts import HeldOutTexts
from skink.evaluation.embeddings import Pooling, Texts
from skink.export.report.measures import RELATIVE_ERROR


class Reader(nn.Module):
    """Hidden states, or scores, that are a table's rows."""

    def __init__(self, name: str, noise: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(40, 16, generator=generator)
        self.table = nn.Parameter(table + noise * torch.randn(40, 16, generator=generator))
        self.name = name

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(**{self.name: self.table[input_ids]})


def texts() -> HeldOutTexts:
    tokens = torch.arange(40).reshape(20, 2)
    several = Texts(tokens, torch.ones_like(tokens))
    # Each query is half of its passage.
    return HeldOutTexts(several, Texts(tokens[:, :1], torch.ones(20, 1)), several, "numbers", "0" * 64)


def test_embeddings_are_compared_with_the_first_models() -> None:
    models = {name: Reader("last_hidden_state", noise) for name, noise in (("a", 0.0), ("b", 0.0), ("c", 0.7))}
    found = encoder_quality(models, texts(), Pooling(), ["last_hidden_state"])
    values = {name: {entry.name: entry.value for entry in entries} for name, entries in found.items()}
    assert set(values["a"]) == {"Recall@1", "Recall@10", "MRR"}
    assert values["b"]["Cosine to source"] > 1 - 1e-12
    assert values["b"]["Same first passage"] == 1
    assert 0.3 < values["c"]["Cosine, 5th percentile"] < values["c"]["Cosine to source"] < 0.95
    assert values["c"]["Order of passages"] < 0.95
    first, third = (models[name].table.detach().double() for name in ("a", "c"))
    assert values["b"][RELATIVE_ERROR] == 0
    assert values["c"][RELATIVE_ERROR] == pytest.approx(float((third - first).square().sum() / first.square().sum()))
    assert {entry.name for entry in found["c"] if entry.better == "less"} == {RELATIVE_ERROR}
    (settings,) = {str(entry.settings) for entries in found.values() for entry in entries}
    assert "'pooling': 'mean, normalised'" in settings
    assert "'queries': 20" in settings


def test_scores_are_compared_with_the_first_models() -> None:
    models = {name: Reader("logits", noise) for name, noise in (("a", 0.0), ("b", 0.0), ("c", 0.7))}
    found = encoder_quality(models, texts(), Pooling(), ["logits"])
    assert found["a"] == ()
    same, divergence = found["b"]
    assert (same.name, same.value, same.better) == ("Same first choice", 1.0, "more")
    assert (divergence.name, divergence.better) == ("Divergence, nats", "less")
    assert abs(divergence.value) < 1e-12
    assert found["c"][0].value < 1
    assert found["c"][1].value > 0.01


def test_the_loss_of_a_head_is_its_divergence_for_each_token() -> None:
    source, model = Reader("logits"), Reader("logits", 0.7)
    p, q = (reader.table.detach().double().softmax(-1) for reader in (source, model))
    expected = float((p * (p / q).log()).sum() / 40)
    assert encoder_loss(source, model, texts(), ["logits"]) == pytest.approx(expected)


def test_the_loss_of_a_text_classifier_is_shared_among_its_tokens() -> None:
    class Classifier(Reader):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.table[input_ids[:, 0]])

    source, model = Classifier("logits"), Classifier("logits", 0.7)
    p, q = (reader.table[::2].detach().double().softmax(-1) for reader in (source, model))
    assert encoder_loss(source, model, texts(), ["logits"]) == pytest.approx(float((p * (p / q).log()).sum() / 40))


def test_the_loss_of_embeddings_is_the_error_of_all_results() -> None:
    source, model = Reader("last_hidden_state"), Reader("last_hidden_state", 0.7)
    exact, found = (reader.table.detach().double() for reader in (source, model))
    expected = float((found - exact).square().sum() / exact.square().sum())
    assert encoder_loss(source, model, texts(), ["last_hidden_state"]) == pytest.approx(expected)
