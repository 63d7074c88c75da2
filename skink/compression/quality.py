"""What is measured of encoders in place of perplexity: embeddings and what they find, or the scores of a head."""

from collections.abc import Mapping, Sequence
from typing import Any

from skink.compression.texts import HeldOutTexts
from skink.evaluation.embeddings import (
    Pooling,
    agreement,
    closeness,
    embed,
    order,
    relative_error,
    retrieval,
)
from skink.export.report import Quality
from skink.export.report.measures import RELATIVE_ERROR, Setting


def encoder_quality(
    models: Mapping[str, Any], texts: HeldOutTexts, pooling: Pooling, outputs: Sequence[str]
) -> dict[str, tuple[Quality, ...]]:
    """Measures of each model; what compares two models compares with the first, which has no such measure.

    Args:
        models: encoders of the same texts, by name; the first is the source.
        texts: that none of them was calibrated on.
        pooling: how embeddings are made.
        outputs: names of their results, `last_hidden_state` first where they give embeddings; else they give scores, as
            heads do.
    """
    settings: dict[str, Setting] = {
        "data": texts.source,
        "data_hash": texts.sha256[:12],
        "texts": len(texts.texts.mask),
    }
    if outputs[0] == "last_hidden_state":
        return _of_embeddings(models, texts, pooling, outputs, settings)
    return _of_scores(models, texts, settings)


def encoder_loss(source: Any, model: Any, texts: HeldOutTexts, outputs: Sequence[str]) -> float:
    """What a pass that prices its edits predicts for an encoder, measured: the unit is that of `loss_unit`.

    Args:
        source: the encoder as it was.
        model: what became of it.
        texts: that it was not calibrated on.
        outputs: names of the results. With `logits` among them it is the divergence of the source's distributions from
            the model's, and else the squared error of all results, each relative to its size.
    """
    if "logits" in outputs:
        found = agreement(source, model, texts.texts)
        return found.divergence * found.count / int(texts.texts.mask.sum())
    return relative_error(source, model, texts.texts, outputs)


def _of_embeddings(
    models: Mapping[str, Any],
    texts: HeldOutTexts,
    pooling: Pooling,
    outputs: Sequence[str],
    settings: dict[str, Setting],
) -> dict[str, tuple[Quality, ...]]:
    source = next(iter(models.values()))
    settings = settings | {
        "queries": len(texts.queries.mask),
        "pooling": pooling.mode + (", normalised" if pooling.normalise else ""),
    }
    measured: dict[str, tuple[Quality, ...]] = {}
    first: list[Any] = []
    for form, model in models.items():
        found = [embed(model, part, pooling) for part in (texts.texts, texts.queries, texts.passages)]
        values: dict[str, float] = {}
        if first:
            close, ordered = closeness(first[0], found[0]), order(first[1], first[2], found[1], found[2])
            values |= {"Cosine to source": close.mean, "Cosine, 5th percentile": close.low}
            values |= {"Order of passages": ordered.spearman, "Same first passage": ordered.top_1}
            values[RELATIVE_ERROR] = relative_error(source, model, texts.texts, outputs)
        else:
            first = found
        hits = retrieval(found[1], found[2])
        values |= {"Recall@1": hits.recall_1, "Recall@10": hits.recall_10, "MRR": hits.mrr}
        measured[form] = tuple(
            Quality(name=name, value=value, better="less" if name == RELATIVE_ERROR else "more", settings=settings)
            for name, value in values.items()
        )
    return measured


def _of_scores(
    models: Mapping[str, Any], texts: HeldOutTexts, settings: dict[str, Setting]
) -> dict[str, tuple[Quality, ...]]:
    (first, source), *others = models.items()
    measured: dict[str, tuple[Quality, ...]] = {first: ()}
    for name, model in others:
        found = agreement(source, model, texts.texts)
        measured[name] = (
            Quality(name="Same first choice", value=found.same, better="more", settings=settings),
            Quality(name="Divergence, nats", value=found.divergence, better="less", settings=settings),
        )
    return measured
