"""Who gets which width: by predicted loss under one budget, all alike, or by how much each layer changes its input."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, fx

from skink.budget import Curve, Pricing, allocate
from skink.budget.interpolate import interpolate
from skink.graph.calibration import counted_rows, real_tokens, token_batches
from skink.graph.output_heads import output_heads
from skink.graph.pattern import op_name
from skink.graph.program import Program
from skink.graph.regions import run_regions
from skink.kernels import find_op
from skink.passes.decompose.reduce_width.parts import Part
from skink.passes.decompose.selection import LinearLayer

# Shares of the width at which costs are taken; between them they are interpolated, which is exact for counts.
_KNOWN = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
# Calibration windows that block influence is measured on.
_FEW_WINDOWS = 16


def widths_on_offer(part: Part, *, multiple: int, floor: float) -> Tensor:
    """The widths that a part may be cut to: multiples, not below `floor` of the width, that can be had: int64[K].

    The last is the width as it is.
    """
    widths = torch.arange(multiple, max(multiple, part.width), multiple)
    widths = widths[widths >= floor * part.width]
    if part.losses is not None:
        widths = widths[torch.isfinite(part.losses[widths])]
    widths = widths[[part.can_have(width) for width in widths.tolist()]]
    return torch.cat((widths, torch.tensor([part.width])))


def part_cost(part: Part, pricing: Pricing, width: int) -> float:
    """What a part costs at a width, in the budget's unit."""
    return sum(pricing.linear(out, in_) for _, out, in_ in part.shapes(width))


def width_costs(part: Part, pricing: Pricing, widths: Tensor) -> Tensor:
    """What a part costs at each width: float64[K]."""
    known = sorted({max(1, round(share * part.width)) for share in _KNOWN})
    return interpolate(widths, known, [part_cost(part, pricing, width) for width in known])


def budget_for(
    parts: Sequence[Part], layers: Sequence[LinearLayer], pricing: Pricing, keep: float
) -> tuple[float, float]:
    """What all of `layers` may cost, the share `keep` of what they do, and what of that no part can change.

    Those are layers that no part changes, and rows of fused projections that no part covers.
    """
    covered = {layer.weight: 0 for layer in layers}
    for part in parts:
        for weight, out, in_ in part.shapes(part.width):
            covered[weight] += out * in_
    rest = sum(
        pricing.linear(rows, layer.shape[1])
        for layer in layers
        if (rows := (layer.parameters - covered[layer.weight]) // layer.shape[1])
    )
    whole = sum(part_cost(part, pricing, part.width) for part in parts)
    return keep * (whole + rest), rest


def by_loss(
    parts: Sequence[Part], offers: Sequence[Tensor], pricing: Pricing, budget: float, *, fixed: float = 0.0
) -> list[int]:
    """The widths that lose least together within a budget, of which `fixed` is taken by what no part changes.

    Raises:
        BudgetError: BUDGET-001 where the smallest widths cost more.
    """
    curves = []
    for part, widths in zip(parts, offers, strict=True):
        losses = part.losses[widths] if part.losses is not None else torch.zeros(len(widths), dtype=torch.float64)
        curves.append(Curve(f"{part.name} ({part.kind})", losses, width_costs(part, pricing, widths)))
    chosen = allocate(curves, budget, fixed=fixed)
    return [int(widths[index]) for widths, index in zip(offers, chosen, strict=True)]


def by_share(
    parts: Sequence[Part],
    offers: Sequence[Tensor],
    pricing: Pricing,
    budget: float,
    importance: Sequence[float],
    *,
    fixed: float = 0.0,
) -> list[int]:
    """Widths whose removed shares are in proportion to softmax(-importance), the most that a budget less `fixed` holds.

    Equal importances give all parts the same share. Source: MoDeGPT (arXiv 2408.09632), equation 10; shares stop at
    what is on offer.

    Raises:
        BudgetError: BUDGET-001 where the smallest widths cost more.
    """
    weights = torch.softmax(-torch.tensor(list(importance), dtype=torch.float64), 0) * len(parts)
    costs = [width_costs(part, pricing, widths) for part, widths in zip(parts, offers, strict=True)]

    def widths_at(sparsity: float) -> list[int]:
        """For each part, the place of the widest offer that leaves out its share."""
        places = []
        for part, widths, weight in zip(parts, offers, weights.tolist(), strict=True):
            most = (1 - min(1.0, sparsity * weight)) * part.width + 1e-9
            places.append(max(0, int((widths <= most).sum()) - 1))
        return places

    def total(places: Sequence[int]) -> float:
        return sum(float(cost[place]) for cost, place in zip(costs, places, strict=True))

    least, most = 0.0, 1.0 / max(float(weights.min()), 1e-12)
    room = budget - fixed
    if total(widths_at(most)) > room:
        # The error says what the least is.
        curves = [Curve(part.name, torch.zeros_like(cost), cost) for part, cost in zip(parts, costs, strict=True)]
        allocate(curves, budget, fixed=fixed)
    places = widths_at(0.0)
    if total(places) > room:
        for _ in range(60):
            middle = (least + most) / 2
            least, most = (middle, most) if total(widths_at(middle)) > room else (least, middle)
        places = widths_at(most)
    return [int(widths[place]) for widths, place in zip(offers, places, strict=True)]


def block_influence(program: Program, parts: Sequence[Part], windows: Tensor, padding: Tensor | None) -> list[float]:
    """How much the layer of each part changes what flows through it: 1 - mean cosine of its input and its output.

    A layer goes from one attention's input to the next one's, before their norms, and the last to the output head or
    the result (ShortGPT, arXiv 2403.03853, equation 1). Without attention, all parts are alike.
    """
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    starts = sorted({_before_norm(node) for node in _inputs_of_layers(program)}, key=order.__getitem__)
    bounds = [*starts, *_end(program, starts)]
    if len(bounds) < 2:
        return [0.0] * len(parts)
    seen: dict[fx.Node, Tensor] = {}
    cosines: list[list[float]] = [[] for _ in bounds[1:]]
    masks = padding[:_FEW_WINDOWS] if padding is not None else None
    for batch in token_batches(program, windows[:_FEW_WINDOWS], padding=masks):
        for _ in run_regions(program, [batch], lambda node, value: seen.update({node: value}), wanted=set(bounds)):
            pass
        real = real_tokens(batch)
        for index, (before, after) in enumerate(pairwise(bounds)):
            start, end = (seen[node].flatten(0, -2).double() for node in (before, after))
            found = torch.cosine_similarity(start, end, dim=-1)
            counted = counted_rows(seen[before], real)
            cosines[index] += (found if counted is None else found[counted]).tolist()
        seen.clear()
    influence = [1 - sum(found) / max(1, len(found)) for found in cosines]
    places = [order[node] for node in bounds[:-1]]
    return [influence[max(0, sum(place <= order[part.lead.readers[0]] for place in places) - 1)] for part in parts]


def _inputs_of_layers(program: Program) -> list[fx.Node]:
    """What the projections before each attention read."""
    found = []
    for node in program.graph.nodes:
        op = find_op(node.target)
        if op is not None and op.name == "attention":
            below = op.bind(node.args, node.kwargs)["query"]
            while op_name(below) != "linear" and below.op == "call_function":
                below = below.all_input_nodes[0]
            if below.op == "call_function":
                found.append(below.all_input_nodes[0])
    return found


def _end(program: Program, starts: Sequence[fx.Node]) -> list[fx.Node]:
    """Where the last layer's output is read or given back, as wide as the layers' inputs and for each token."""
    heads = [head.all_input_nodes[0] for head in output_heads(program)]
    # A head that reads one token alone tells nothing; then it is what was last computed of that shape.
    candidates = (*heads, *program.graph.output_node().all_input_nodes, *reversed(program.graph.nodes))
    shapes = {_shape(start) for start in starts}
    for node in candidates:
        if node.op == "call_function" and _shape(node) in shapes:
            found = _before_norm(node)
            return [found] if found not in starts else []
    return []


def _shape(node: fx.Node) -> tuple[int, int]:
    """How many axes a value has, and how long the last one is; (0, 0) where that hangs on the text."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.dim() or not isinstance(value.shape[-1], int):
        return 0, 0
    return value.dim(), value.shape[-1]


def _before_norm(node: fx.Node) -> fx.Node:
    op = find_op(node.target)
    name = op.name if op is not None else op_name(node)
    return node.all_input_nodes[0] if name in ("rms_norm", "layer_norm") else node
