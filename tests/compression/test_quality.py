"""Measures of encoders: what is compared, and with whom."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from skink.compression.quality import encoder_quality
from skink.compression.texts import HeldOutTexts
from skink.evaluation.embeddings import Pooling, Texts


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
    found = encoder_quality(models, texts(), Pooling(), embeds=True)
    values = {name: {entry.name: entry.value for entry in entries} for name, entries in found.items()}
    assert set(values["a"]) == {"Recall@1", "Recall@10", "MRR"}
    assert values["b"]["Cosine to source"] > 1 - 1e-12
    assert values["b"]["Same first passage"] == 1
    assert 0.3 < values["c"]["Cosine, 5th percentile"] < values["c"]["Cosine to source"] < 0.95
    assert values["c"]["Order of passages"] < 0.95
    (settings,) = {str(entry.settings) for entries in found.values() for entry in entries}
    assert "'pooling': 'mean, normalised'" in settings
    assert "'queries': 20" in settings


def test_scores_are_compared_with_the_first_models() -> None:
    models = {name: Reader("logits", noise) for name, noise in (("a", 0.0), ("b", 0.0), ("c", 0.7))}
    found = encoder_quality(models, texts(), Pooling(), embeds=False)
    assert found["a"] == ()
    same, divergence = found["b"]
    assert (same.name, same.value, same.better) == ("Same first choice", 1.0, "more")
    assert (divergence.name, divergence.better) == ("Divergence, nats", "less")
    assert abs(divergence.value) < 1e-12
    assert found["c"][0].value < 1
    assert found["c"][1].value > 0.01
