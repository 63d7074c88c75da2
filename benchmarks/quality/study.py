"""The design space of a study of low-rank decomposition on a model of ours, and what it found there: tables and plots.

Moar et al. 2024 (arXiv 2405.06626) replace tensors of chosen layers by their Tucker decomposition at one rank, without
text and without training. First everything is tried that answers one question at a time: each layer, all pairs and
triples, each tensor, each rank. Then the best of it is measured again on more text, beside other methods that leave as
many parameters in the linear layers.

    python benchmarks/quality/study.py [--model stdlib-llama] [--calibration TEXT] --out FOLDER [--images FOLDER]

The folder keeps what is finished: the same call goes on from there. Tables are printed as Markdown, plots are SVG.
"""

import argparse
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from study_plots import Series, bars, grid, scatter

from skink import Exploration, ExploreOptions, explore
from skink.compression import SpeedOptions, TextOptions
from skink.exploration.result import PointResult

RANKS = (1, 4, 16, 64)
_ONE = {"subsets": "layers", "sizes": [1]}
_TENSOR = {"subsets": "tensors", "sizes": [1]}

# One question at a time: which layer, which two or three together, which tensor, and which rank.
WIDE: dict[str, Any] = {
    "description": "One question at a time.",
    "families": [
        {
            "name": "layers",
            "axes": {"layers": _ONE, "rank": list(RANKS)},
            "recipe": "tucker{layers=$layers,rank=$rank}",
        },
        {
            "name": "several",
            "axes": {"layers": {"subsets": "layers", "sizes": [2, 3]}, "rank": [1]},
            "recipe": "tucker{layers=$layers,rank=$rank}",
        },
        {
            "name": "tensors",
            "axes": {"tensors": _TENSOR, "rank": list(RANKS)},
            "recipe": "tucker{tensors=$tensors,rank=$rank}",
        },
        {
            "name": "tensors of layers",
            "axes": {"layers": _ONE, "tensors": _TENSOR, "rank": [1]},
            "recipe": "tucker{layers=$layers,tensors=$tensors,rank=$rank}",
        },
    ],
}

Losses = dict[tuple[tuple[int, ...], tuple[str, ...], int], float]


def main() -> None:
    """Run both parts, print the tables and write the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stdlib-llama")
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--name", default="study", help="what the names of images begin with")
    parser.add_argument("--quality", choices=("perplexity", "embedding"), default="perplexity")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of 512 tokens for the first part")
    parser.add_argument("--without", nargs="*", default=[], help="families of the first part to leave out")
    parser.add_argument("--only-wide", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    few = ExploreOptions(
        calibration=arguments.calibration,
        texts=TextOptions(held_out_windows=arguments.windows),
        quality=(arguments.quality,),
        latency=False,
    )
    families = [family for family in WIDE["families"] if family["name"] not in arguments.without]
    wide = explore(arguments.model, {**WIDE, "families": families}, arguments.out / "wide", few)
    losses = {_key(point): _loss(wide, point) for point in wide.points if point.metrics}
    images = {**_which_layers(losses), **_together(losses), **_which_tensors(losses)}
    if not arguments.only_wide:
        more = ExploreOptions(
            calibration=arguments.calibration,
            texts=TextOptions(calibration_windows=32, held_out_windows=32),
            quality=(arguments.quality, *(("questions",) if arguments.quality == "perplexity" else ())),
            questions=100,
            speed=SpeedOptions(prompt=32, new_tokens=32, rounds=5),
        )
        chosen = explore(arguments.model, _chosen(wide, losses), arguments.out / "chosen", more)
        images |= _same_size(chosen)
    if arguments.images is not None:
        for name, image in images.items():
            (arguments.images / f"{arguments.name}_{name}.svg").write_text(image)


def _key(point: PointResult) -> tuple[tuple[int, ...], tuple[str, ...], int]:
    values = point.values
    return tuple(values.get("layers", ())), tuple(values.get("tensors", ())), values["rank"]


def _loss(found: Exploration, point: PointResult) -> float:
    """What a point costs: nats per token over the dense model's, or of an encoder 1 - cosine to its embeddings."""
    if "cosine" in point.metrics:
        return 1.0 - point.metrics["cosine"]
    return math.log(point.metrics["perplexity"] / found.dense.metrics["perplexity"])


def _which_layers(losses: Losses) -> dict[str, str]:
    layers = sorted({one[0] for one, tensors, _ in losses if len(one) == 1 and not tensors})
    table = [[losses[(layer,), (), rank] for rank in RANKS] for layer in layers]
    _print("layer", [f"rank {rank}" for rank in RANKS], dict(zip(map(str, layers), table, strict=True)))
    logs = torch.tensor(table).clamp(min=1e-5).log()
    centred = logs - logs.mean()
    shares = [len(RANKS) * centred.mean(1).square().sum(), len(layers) * centred.mean(0).square().sum()]
    parts = [float(share / centred.square().sum()) for share in shares]
    print(f"\nof the variance of the logarithm: {parts[0]:.0%} between layers, {parts[1]:.0%} between ranks\n")
    series = [(f"rank {rank}", [max(row[index], 1e-4) for row in table]) for index, rank in enumerate(RANKS)]
    return {"layers": bars("One layer alone", [f"layer {layer}" for layer in layers], series, "added loss")}


def _together(losses: Losses) -> dict[str, str]:
    one = {
        layers[0]: loss for (layers, tensors, rank), loss in losses.items() if len(layers) == rank == 1 and not tensors
    }
    several = {layers: loss for (layers, tensors, _), loss in losses.items() if len(layers) > 1 and not tensors}
    # The first layer costs more than all others, so that nothing else would be seen beside it.
    inner = {layers: loss for layers, loss in several.items() if 0 not in layers}
    rows: dict[str, list[float]] = {}
    for gap in range(1, max(one)):
        found = {layers: loss for layers, loss in inner.items() if _gaps(layers) == [gap]}
        if found:
            rows[f"two, {gap} apart"] = _beside_sum(found, one)
    triples = {layers: loss for layers, loss in inner.items() if len(_gaps(layers)) == 2}
    near = {layers: loss for layers, loss in triples.items() if _gaps(layers) == [1, 1]}
    spaced = {layers: loss for layers, loss in triples.items() if min(_gaps(layers)) > 1}
    mixed = {layers: loss for layers, loss in triples.items() if layers not in near and layers not in spaced}
    for name, found in (("three in a row", near), ("three, two in a row", mixed), ("three, spaced", spaced)):
        if found:
            rows[name] = _beside_sum(found, one)
    print("without the first layer:\n")
    _print("layers", ["sets", "mean added loss", "mean sum of each alone", "ratio"], rows)
    sums = [sum(one[layer] for layer in layers) for layers in several]
    print(f"\nrank correlation of a set's loss with the sum: {_spearman(sums, list(several.values())):.3f}")
    for size in (2, 3):
        ordered = sorted((loss, layers) for layers, loss in several.items() if len(layers) == size)
        print(f"best of {size}: {[(list(layers), round(loss, 4)) for loss, layers in ordered[:5]]}")
        print(f"worst of {size}: {[(list(layers), round(loss, 4)) for loss, layers in ordered[-2:]]}")
    print()
    numbers = sorted(one)
    cells = [
        [one[row] if row == column else several.get((row, column)) if row < column else None for column in numbers]
        for row in numbers
    ]
    names = [str(number) for number in numbers]
    return {"pairs": grid("Two layers at rank 1 (one, on the diagonal): added loss", names, names, cells)}


def _gaps(layers: Sequence[int]) -> list[int]:
    return [after - before for before, after in pairwise(layers)]


def _beside_sum(found: dict[tuple[int, ...], float], one: dict[int, float]) -> list[float]:
    mean, alone = fmean(found.values()), fmean(sum(one[layer] for layer in layers) for layers in found)
    return [len(found), mean, alone, mean / alone]


def _spearman(one: Sequence[float], other: Sequence[float]) -> float:
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def _which_tensors(losses: Losses) -> dict[str, str]:
    tensors = list(dict.fromkeys(names[0] for _, names, _ in losses if names))
    layers = sorted({one[0] for one, names, _ in losses if len(one) == 1 and names})
    _print(
        "tensor, in all layers",
        [f"rank {rank}" for rank in RANKS],
        {tensor: [losses[(), (tensor,), rank] for rank in RANKS] for tensor in tensors},
    )
    print()
    if not layers:
        return {}
    cells = [[max(losses[(layer,), (tensor,), 1], 1e-4) for tensor in tensors] for layer in layers]
    leaves = [tensor.replace("attention.", "").replace(".dense", "").rpartition(".")[2] for tensor in tensors]
    rows = [f"layer {layer}" for layer in layers]
    return {"tensors": grid("One tensor of one layer at rank 1: added loss", rows, leaves, cells)}


def _chosen(wide: Exploration, losses: Losses) -> dict[str, Any]:
    """The best sets of one and three layers at rank 1, and other ways to as many parameters."""
    dense = wide.dense.metrics["linear_parameters"]
    points = {_key(point): point for point in wide.points if point.metrics}
    families: list[dict[str, Any]] = []
    for size in (1, 3):
        best = min(
            (key for key in points if len(key[0]) == size and not key[1] and key[2] == 1), key=losses.__getitem__
        )
        left = points[best].metrics["linear_parameters"]
        keep = round(left / dense, 4)
        more = _more_layers(points, losses, dense, left)
        families += [
            {"name": f"rank 1 {size}", "axes": {"layers": [list(best[0])], "method": ["plain", "two-sided"]},
             "recipe": "tucker{rank=1,layers=$layers,method=$method}"},
            {"name": f"rank {RANKS[-1]} {size}", "axes": {"layers": [more], "method": ["plain"]},
             "recipe": f"tucker{{rank={RANKS[-1]},layers=$layers,method=$method}}"},
            {"name": f"low rank {size}", "axes": {"keep": [keep], "method": ["plain", "whitened", "two-sided"]},
             "recipe": "low-rank{keep=$keep,method=$method}"},
            {"name": f"basis sharing {size}", "axes": {"keep": [keep]}, "recipe": "basis-sharing{keep=$keep}"},
        ]  # fmt: skip
    return {"description": "The best of the study beside other methods at its sizes.", "families": families}


def _more_layers(
    points: dict[tuple[tuple[int, ...], tuple[str, ...], int], PointResult], losses: Losses, dense: float, left: float
) -> list[int]:
    """The layers that cost least at the largest rank, as many as leave no more than `left` of the parameters."""
    one = [key for key in points if len(key[0]) == 1 and not key[1] and key[2] == RANKS[-1]]
    chosen: list[int] = []
    saved = 0.0
    for key in sorted(one, key=losses.__getitem__):
        if dense - saved > left:
            saved += dense - points[key].metrics["linear_parameters"]
            chosen.append(key[0][0])
    return sorted(chosen)


def _same_size(found: Exploration) -> dict[str, str]:
    seen = {name for point in found.points for name in point.metrics}
    wanted = ("linear_parameters", "perplexity", "accuracy", "cosine", "order", "latency")
    names = [name for name in wanted if name in seen]
    rows = {"dense": [found.dense.metrics.get(name, 1.0) for name in names]}
    series: dict[str, list[tuple[float, float]]] = {}
    for point in found.points:
        if not point.metrics:
            print(f"failed: {point.recipe}: {point.error}")
            continue
        method = f"{point.family.rpartition(' ')[0]}, {point.values.get('method', 'two-sided')}"
        kept = point.metrics["linear_parameters"] / found.dense.metrics["linear_parameters"]
        rows[f"{method} {point.values.get('layers', '')} ({kept:.1%})"] = [
            point.metrics.get(name, math.nan) for name in names
        ]
        series.setdefault(method, []).append((100 * (1 - kept), max(_loss(found, point), 1e-4)))
    _print("chosen", names, rows)
    marked = [Series(name, sorted(points)) for name, points in series.items()]
    across = "linear parameters taken away, %"
    return {"same_size": scatter("The study's best and other methods, at equal size", marked, across, "added loss")}


def _print(first: str, columns: Sequence[str], rows: dict[str, list[float]]) -> None:
    print(f"| {first} | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name, values in rows.items():
        cells = [f"{value:,}" if isinstance(value, int) else f"{value:.4f}" for value in values]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
