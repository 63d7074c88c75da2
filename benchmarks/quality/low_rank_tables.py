"""The tables of low_rank.py: methods by shares of the parameters, and single matrices."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from rows import table

from skink.evaluation import Accuracy, paired
from skink.export.report.measures import RELATIVE_ERROR

MISSING = "-"


def added(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """Predicted and measured loss."""
    predicted = MISSING if row["predicted"] is None else f"{row['predicted']:.4f}"
    measured = row["measures"][RELATIVE_ERROR] if "measures" in row else row["nats"] - dense["nats"]
    return f"{predicted} / {measured:.4f}"


def accuracy(row: Mapping[str, Any], dense: Mapping[str, Any], kind: str) -> str:
    """A percentage, and the paired difference to the dense model with its standard error."""
    if kind not in row["accuracies"]:
        return MISSING
    kinds = [each["accuracies"][kind] for each in (dense, row)]
    first, second = (Accuracy(**(found | {"correct": tuple(found["correct"])})) for found in kinds)
    difference = paired(first, second)
    return f"{100 * second.value:.1f} ({100 * difference.value:+.1f} ± {100 * difference.standard_error:.1f})"


def ratio(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """The perplexity over the dense model's."""
    return f"{row['perplexity'] / dense['perplexity']:.4f}"


def agreement(row: Mapping[str, Any], name: str) -> str:
    """One measure of an encoder."""
    return f"{row['measures'][name]:.4f}"


def sections(dense: Mapping[str, Any], rows: Mapping[str, Mapping[float, Any]], keeps: list[float]) -> list[str]:
    """Every table of methods by shares."""

    def grid(title: str, cell: Callable[[Any], str]) -> str:
        lines = [[name, *(cell(row[keep]) if keep in row else MISSING for keep in keeps)] for name, row in rows.items()]
        return table(title, ["method", *(f"{keep:.0%}" for keep in keeps)], lines)

    found = []
    if "perplexity" in dense:
        found.append(
            grid(f"Held-out perplexity over the dense model's {dense['perplexity']:.4f}", partial(ratio, dense=dense))
        )
        found.append(grid("Loss added, predicted / measured, nats per token", partial(added, dense=dense)))
        for kind, known in dense["accuracies"].items():
            title = (
                f"Accuracy, {kind}, in per cent (dense {100 * known['value']:.1f}; in brackets the paired difference)"
            )
            found.append(grid(title, partial(accuracy, dense=dense, kind=kind)))
    if RELATIVE_ERROR in dense.get("measures", ()):
        found.append(grid(f"{RELATIVE_ERROR}, predicted / measured", partial(added, dense=dense)))
    found += [grid(name, partial(agreement, name=name)) for name in dense.get("measures", ()) if name != RELATIVE_ERROR]
    return [*found, grid("Linear parameters kept", lambda row: f"{row['kept']:.1%}")]


def matrix_section(recipe: str, found: list[dict[str, Any]], about: str) -> str:
    """The table of single matrices, and how well the prediction orders and sizes them; `about`: unit and text."""
    rows = [
        [entry["name"], " x ".join(map(str, entry["shape"])), str(entry["rank"]),
         MISSING if entry["predicted"] is None else f"{entry['predicted']:.6f}", f"{entry['measured']:.6f}"]
        for entry in found
    ]  # fmt: skip
    pairs = [(entry["predicted"], entry["measured"]) for entry in found if entry["predicted"] is not None]
    text = table(f"Every matrix alone: `{recipe}`", ["matrix", "out x in", "rank", "predicted", "measured"], rows)
    if len(pairs) > 2:
        both = torch.tensor(pairs, dtype=torch.float64)
        ranks = both.argsort(dim=0).argsort(dim=0).double()
        order = float(torch.corrcoef(ranks.T)[0, 1])
        total = both.sum(dim=0)
        text += (
            f"\nSums: predicted {total[0]:.4f}, measured {total[1]:.4f} {about}. Rank correlation over {len(pairs)} "
            f"matrices: {order:.3f}.\n"
        )
    return text
