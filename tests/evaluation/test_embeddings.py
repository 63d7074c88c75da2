"""Embeddings and what they find, against formulas written out for a few numbers."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skink.errors import InputError
from skink.evaluation.embeddings import (
    Pooling,
    Texts,
    agreement,
    closeness,
    embed,
    order,
    relative_error,
    retrieval,
)

HIDDEN = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[50.0, 50.0], [-4.0, 3.0], [2.0, 1.0]]])
MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("mean", [[2.0, 4.0], [-1.0, 2.0]]), ("cls", [[1.0, 2.0], [-4.0, 3.0]]), ("max", [[3.0, 6.0], [2.0, 3.0]])],
)
def test_pooling_reads_no_padding(mode: Any, expected: list[list[float]]) -> None:
    exact = torch.tensor(expected)
    torch.testing.assert_close(Pooling(mode, normalise=False)(HIDDEN, MASK), exact)
    torch.testing.assert_close(Pooling(mode)(HIDDEN, MASK), exact / exact.norm(dim=1, keepdim=True))
    poisoned = HIDDEN.masked_fill(MASK[..., None] == 0, torch.nan)
    torch.testing.assert_close(Pooling(mode, normalise=False)(poisoned, MASK), exact)


class Reader(nn.Module):
    """Hidden states that are a table's rows; it remembers how wide the batches were."""

    def __init__(self, scores: bool = False) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(24.0).reshape(12, 2).sin())
        self.scores, self.widths = scores, []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        self.widths.append(input_ids.shape[1])
        hidden = self.table[input_ids]
        return SimpleNamespace(**({"logits": hidden} if self.scores else {"last_hidden_state": hidden}))


def test_embeddings_do_not_depend_on_batches_and_read_no_common_padding() -> None:
    tokens = torch.tensor([[3, 4, 0, 0, 0], [5, 0, 0, 0, 0], [1, 2, 7, 0, 0]])
    texts = Texts(tokens, (tokens > 0).long())
    reader = Reader()
    found = embed(reader, texts, Pooling(normalise=False), batch=2)
    assert reader.widths == [2, 3]
    table = reader.table.detach().double()
    torch.testing.assert_close(found, torch.stack([table[[3, 4]].mean(0), table[5], table[[1, 2, 7]].mean(0)]))
    torch.testing.assert_close(embed(reader, texts, Pooling(normalise=False), batch=3), found)


def test_closeness_is_the_cosine_of_each_text() -> None:
    left = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    right = torch.tensor([[5.0, 0.0], [1.0, 0.0], [4.0, 3.0]])
    found = closeness(left, right)
    assert found.mean == pytest.approx((1 + 0 + 24 / 25) / 3)
    assert found.low == pytest.approx(0.1 * 24 / 25)
    assert found.texts == 3


def test_retrieval_counts_the_place_of_the_right_passage() -> None:
    passages = torch.eye(12)
    queries = torch.eye(12)
    # The first query's own passage comes third, the last one's last but one.
    queries[0] = torch.tensor([0.5, 0.9, 0.8, *[0.0] * 9])
    queries[11] = torch.tensor([*torch.linspace(1, 2, 10), -1.0, 0.0])
    found = retrieval(queries, passages)
    assert found.recall_1 == pytest.approx(10 / 12)
    assert found.recall_10 == pytest.approx(11 / 12)
    assert found.mrr == pytest.approx((10 + 1 / 3 + 1 / 11) / 12)


def test_ties_and_nan_count_against_a_query() -> None:
    assert retrieval(torch.ones(4, 2), torch.ones(4, 2)).recall_1 == 0
    assert retrieval(torch.full((12, 2), torch.nan), torch.ones(12, 2)).mrr == pytest.approx(1 / 12)


def test_order_is_spearmans_and_the_first_passage() -> None:
    passages = torch.eye(4)
    left = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    right = torch.tensor([[4.0, 2.0, 3.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    found = order(left, passages, right, passages)
    # 1 - 6 sum d^2 / (n (n^2 - 1)): 1 - 12/60 and -1.
    assert found.spearman == pytest.approx((0.8 - 1) / 2)
    assert found.top_1 == 0.5


def test_agreement_compares_distributions_of_real_tokens() -> None:
    left, right = Reader(scores=True), Reader(scores=True)
    with torch.no_grad():
        right.table[3] = right.table[3].flip(0)
        right.table[0] = 1e3
    tokens = torch.tensor([[3, 4, 0], [5, 6, 7]])
    found = agreement(left, right, Texts(tokens, (tokens > 0).long()))
    p, q = (reader.table[3].detach().double().softmax(-1) for reader in (left, right))
    assert found.same == pytest.approx(4 / 5)
    assert found.divergence == pytest.approx(float((p * (p / q).log()).sum()) / 5)
    assert found.count == 5


def test_agreement_of_scores_of_whole_texts_and_of_places() -> None:
    class Classifier(Reader):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.table[input_ids[:, 0]])

    class Finder(Reader):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
            scores = self.table[input_ids]
            return SimpleNamespace(start_logits=scores[..., 0], end_logits=scores[..., 1])

    tokens = torch.tensor([[3, 4, 0], [5, 6, 7]])
    texts = Texts(tokens, (tokens > 0).long())
    for kind, count in ((Classifier, 2), (Finder, 4)):
        found = agreement(kind(), kind(), texts)
        assert (found.same, found.count) == (1.0, count)
        assert abs(found.divergence) < 1e-12


def test_the_error_of_results_counts_real_tokens_and_adds_up_results() -> None:
    class Pooled(Reader):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
            hidden = self.table[input_ids]
            return SimpleNamespace(last_hidden_state=hidden, pooler_output=hidden[:, 0] * 2)

    left, right = Pooled(), Pooled()
    with torch.no_grad():
        right.table[4] += torch.tensor([3.0, 4.0])
        right.table[0] = torch.nan
    tokens = torch.tensor([[3, 4, 0], [4, 6, 7]])
    table = left.table.detach().double()
    hidden = 2 * 25 / float(table[[3, 4, 4, 6, 7]].square().sum())
    pooled = 4 * 25 / (4 * float(table[[3, 4]].square().sum()))
    texts = Texts(tokens, (tokens > 0).long())
    names = ["last_hidden_state", "pooler_output"]
    for batch in (1, 2):
        assert relative_error(left, right, texts, names, batch=batch) == pytest.approx(hidden + pooled)
    with torch.no_grad():
        left.table.zero_()
    assert relative_error(left, right, texts, names) == math.inf


def test_no_text_is_refused() -> None:
    nothing = torch.zeros(0, 3, dtype=torch.int64)
    with pytest.raises(InputError, match=r"\[INPUT-001\]"):
        relative_error(Reader(), Reader(), Texts(nothing, nothing), ["last_hidden_state"])
    with pytest.raises(InputError, match=r"\[INPUT-001\]"):
        agreement(Reader(scores=True), Reader(scores=True), Texts(nothing, nothing))


def test_gradients_are_on_afterwards() -> None:
    texts = Texts(torch.tensor([[3, 4], [5, 0]]), torch.tensor([[1, 1], [1, 0]]))
    agreement(Reader(scores=True), Reader(scores=True), texts, batch=1)
    embed(Reader(), texts, Pooling(), batch=1)
    assert torch.is_grad_enabled()
