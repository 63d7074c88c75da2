"""How alike the results of an encoder and of a smaller one are: embeddings of texts, and what they find.

An embedding is pooled from the last layer's hidden states h_t, over the tokens that are no padding:

    mean: e = sum_t h_t / n      cls: e = h_1      max: e_i = max_t h_ti      then e / |e| where it is normalised

as sentence-transformers does it (Reimers & Gurevych 2019, arXiv 1908.10084, section 3).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from skink.errors import InputError

PoolingMode = Literal["mean", "cls", "max"]
_RANKS = 10  # of recall@10


@dataclass(frozen=True)
class Pooling:
    """How an embedding is made of hidden states.

    Args:
        mode: over which tokens; see above.
        normalise: to length 1.
    """

    mode: PoolingMode = "mean"
    normalise: bool = True

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Embeddings [B, E] of hidden states [B, T, E] under a mask int or bool[B, T], 0 for padding."""
        real = mask.bool()[..., None]
        if self.mode == "mean":
            pooled = hidden.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)
        elif self.mode == "max":
            pooled = hidden.masked_fill(~real, -torch.inf).amax(1)
        else:
            # The first token that is no padding, whichever side padding is on.
            first = mask.to(torch.int64).argmax(1)
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), first]
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalise else pooled


@dataclass(frozen=True)
class Texts:
    """Tokenised texts.

    Args:
        tokens: int64[N, T].
        mask: int64[N, T], 1 for tokens and 0 for padding.
    """

    tokens: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Retrieval:
    """How well each query finds its own passage among all.

    Args:
        recall_1: share of queries whose nearest passage is their own.
        recall_10: share of those whose own passage is among the nearest ten.
        mrr: mean of 1 / rank of the own passage.
        queries: how many.
    """

    recall_1: float
    recall_10: float
    mrr: float
    queries: int


@dataclass(frozen=True)
class Closeness:
    """How alike embeddings of the same texts are in two models, row by row.

    Args:
        mean: cosine.
        low: its 5th percentile: one text in twenty fares worse.
        texts: how many.
    """

    mean: float
    low: float
    texts: int


@dataclass(frozen=True)
class Order:
    """How alike two models order passages by their likeness to a query.

    Args:
        spearman: mean over queries of Spearman's rank correlation, in [-1, 1].
        top_1: share of queries whose nearest passage is the same.
        queries: how many.
    """

    spearman: float
    top_1: float
    queries: int


@dataclass(frozen=True)
class Agreement:
    """How alike the scores of two heads are.

    Args:
        same: share of tokens, or of texts, for which both put the same first.
        divergence: mean Kullback-Leibler divergence of the second's distribution from the first's, in nats.
        count: of tokens or texts.
    """

    same: float
    divergence: float
    count: int


def embed(model: Any, texts: Texts, pooling: Pooling, *, batch: int = 32) -> Tensor:
    """Embeddings float64[N, E] on the CPU.

    Args:
        model: a Hugging Face encoder, or one of ours: what returns `last_hidden_state`.
        texts: to embed.
        pooling: how.
        batch: texts at once.
    """
    parts = [
        pooling(result.last_hidden_state.double(), mask).cpu() for result, mask in _results(model, texts, batch=batch)
    ]
    return torch.cat(parts)


def closeness(left: Tensor, right: Tensor) -> Closeness:
    """Of embeddings [N, E] of the same texts."""
    cosine = torch.nn.functional.cosine_similarity(left.double(), right.double(), dim=-1)
    return Closeness(float(cosine.mean()), float(cosine.quantile(0.05)), len(cosine))


def retrieval(queries: Tensor, passages: Tensor) -> Retrieval:
    """Of embeddings [N, E], where the passage of query i is i. Ties count against the query."""
    scores = _cosines(queries, passages)
    own = scores.diagonal()[:, None]
    # NaN ranks last: nothing is found by it.
    ranks = (~(scores < own)).sum(1).clamp(min=1).double()
    return Retrieval(
        recall_1=float((ranks <= 1).double().mean()),
        recall_10=float((ranks <= _RANKS).double().mean()),
        mrr=float((1 / ranks).mean()),
        queries=len(scores),
    )


def order(queries: Tensor, passages: Tensor, other_queries: Tensor, other_passages: Tensor) -> Order:
    """Of two models' embeddings [N, E] of the same queries and passages."""
    left, right = _cosines(queries, passages), _cosines(other_queries, other_passages)
    one, two = (_centred_ranks(scores) for scores in (left, right))
    spearman = torch.nn.functional.cosine_similarity(one, two, dim=1)
    return Order(
        spearman=float(spearman.mean()),
        top_1=float((left.argmax(1) == right.argmax(1)).double().mean()),
        queries=len(left),
    )


def agreement(left: Any, right: Any, texts: Texts, *, batch: int = 16) -> Agreement:
    """Of the scores of two models with heads, on the same texts.

    Args:
        left: a Hugging Face encoder with a head, whose results are scores: of each token, or of the text.
        right: another.
        texts: to read.
        batch: texts at once.

    Raises:
        InputError: INPUT-001, no text.
    """
    same, divergence, count = 0.0, 0.0, 0
    pairs = zip(_results(left, texts, batch=batch), _results(right, texts, batch=batch), strict=True)
    for (first, mask), (second, _) in pairs:
        for one, two in zip(_scores(first), _scores(second), strict=True):
            if one.shape[:2] == mask.shape and one.dim() == 3:
                real = mask.bool()
                one, two = one[real], two[real]
            elif one.shape == mask.shape:
                # Scores of tokens as the place of an answer: a distribution over the tokens of one text.
                one, two = (scores.masked_fill(~mask.bool(), -1e9) for scores in (one, two))
            one, two = one.double().log_softmax(-1), two.double().log_softmax(-1)
            same += float((one.argmax(-1) == two.argmax(-1)).sum())
            divergence += float((one.exp() * (one - two)).sum())
            count += len(one)
    if not count:
        raise InputError("INPUT-001", "there is no text to compare scores on.", fix="give held-out text.")
    return Agreement(same / count, divergence / count, count)


def relative_error(left: Any, right: Any, texts: Texts, names: Sequence[str], *, batch: int = 16) -> float:
    """Sum over results of |right - left|^2 / |left|^2, each over all tokens that are no padding.

    Args:
        left: a Hugging Face encoder.
        right: another.
        texts: to read.
        names: of the results: [B, T, ...], or [B, E] where one is of the whole text.
        batch: texts at once.

    Raises:
        InputError: INPUT-001, no text.
    """
    if not bool(texts.mask.any()):
        raise InputError("INPUT-001", "there is no text to compare results on.", fix="give held-out text.")
    error, size = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    pairs = zip(_results(left, texts, batch=batch), _results(right, texts, batch=batch), strict=True)
    for (first, mask), (second, _) in pairs:
        real = mask.bool().cpu()
        for name in names:
            one, two = (getattr(result, name).double().cpu() for result in (first, second))
            if one.shape[:2] == real.shape:
                one, two = one[real], two[real]
            error[name] += float((two - one).square().sum())
            size[name] += float(one.square().sum())
    return sum(error[name] / size[name] if size[name] else math.inf for name in names)


def _results(model: Any, texts: Texts, *, batch: int) -> Iterator[tuple[Any, Tensor]]:
    """A model's results on a few texts at a time, and their mask."""
    parameter = next(model.parameters())
    for tokens, mask in zip(texts.tokens.split(batch), texts.mask.split(batch), strict=True):
        # Texts lie beside others of other lengths: what is padding for all of them is not read.
        width = int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else mask.shape[1]
        shown = mask[:, :width].to(parameter.device)
        # Not around the yield: whoever reads would be without gradients, and perhaps stay so.
        with torch.no_grad():
            result = model(input_ids=tokens[:, :width].to(parameter.device), attention_mask=shown)
        yield result, shown


def _scores(result: Any) -> Sequence[Tensor]:
    logits = getattr(result, "logits", None)
    return (result.start_logits, result.end_logits) if logits is None else (logits,)


def _centred_ranks(scores: Tensor) -> Tensor:
    """Place of each score in its row, from the smallest, less the mean of all places."""
    ranks: Tensor = scores.argsort(dim=1, stable=True).argsort(dim=1).double()
    return ranks - ranks.mean(1, keepdim=True)


def _cosines(queries: Tensor, passages: Tensor) -> Tensor:
    left = torch.nn.functional.normalize(queries.double(), dim=-1)
    right = torch.nn.functional.normalize(passages.double(), dim=-1)
    return left @ right.mT
