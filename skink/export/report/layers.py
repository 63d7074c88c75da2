"""What the terminal and the page both say of layers: grouped by their role, in a sentence, and why some were left."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from skink.export.report import formatting as fmt
from skink.export.report.model import LayerRecord, PassRecord

# The decision on a layer that nothing was done to.
KEPT = "kept dense"


@dataclass(frozen=True)
class Role:
    """The layers that do the same work in each block: `layers` pairs the block's number, as text, with the layer."""

    name: str
    layers: tuple[tuple[str, LayerRecord], ...]


def roles(layers: Sequence[LayerRecord]) -> list[Role]:
    """Layers whose names differ in their numbers alone, in the order of their first; single ones come last, as one."""
    grouped: dict[str, list[tuple[str, LayerRecord]]] = {}
    for layer in layers:
        parts = layer.name.split(".")
        number = ".".join(part for part in parts if part.isdecimal())
        # A name without a number stands alone, even where it repeats.
        role = ".".join("*" if part.isdecimal() else part for part in parts) if number else layer.name
        grouped.setdefault(role, []).append((number or parts[-1], layer))
    found = [Role(re.sub(r"^.*?\*\.", "", name), tuple(found)) for name, found in grouped.items() if len(found) > 1]
    if len({role.name for role in found}) < len(found):
        found = [Role(name, tuple(found)) for name, found in grouped.items() if len(found) > 1]
    single = [(layer.name, layer) for found in grouped.values() if len(found) == 1 for _, layer in found]
    return [*found, Role("other layers" if found else "layers", tuple(single))] if single else found


def layers_sentence(layers: Sequence[LayerRecord]) -> str:
    """One sentence or two on what became of the layers."""
    changed = [layer for layer in layers if layer.decision != KEPT]
    counts = Counter(layer.decision for layer in changed) or {"factored": 0}
    done = [f"{count} of {len(layers)} layers {decision}" for decision, count in counts.items()]
    before = sum(layer.parameters_before for layer in layers)
    after = sum(layer.parameters_after for layer in layers)
    text = f"{', '.join(done)}, {len(layers) - len(changed)} kept dense: "
    text += f"{fmt.count(before)} parameters became {fmt.count(after)}"
    text += f" ({fmt.change(after / before)})." if before else "."
    pairs = [
        (layer.predicted_error, layer.baseline_error)
        for layer in changed
        if layer.predicted_error is not None and layer.baseline_error
    ]
    if pairs:
        lower = sum(ours < theirs for ours, theirs in pairs)
        typical = median(ours / theirs for ours, theirs in pairs)
        text += (
            f" At equal rank the relative output error is below plain SVD's in {lower} of {len(pairs)}, "
            f"and {typical:.2f} of it in the median."
        )
    return text


def rejections_by_reason(record: PassRecord) -> list[tuple[str, list[str]]]:
    """(reason, places), the commonest reason first."""
    grouped: dict[str, list[str]] = {}
    for rejection in record.rejections:
        grouped.setdefault(rejection.reason, []).append(rejection.where)
    return sorted(grouped.items(), key=lambda item: -len(item[1]))
