"""How a factored layer runs: fused, as the products that it is, or multiplied out; whichever is quickest for one token.

It depends on the machine, so it is measured, once for each shape (`skink.kernels.low_rank_linear.break_even`). Exact:
the forms differ in rounding alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from skink.graph.program import Program
from skink.kernels import OpCall, OpDef
from skink.kernels.low_rank_linear.break_even import Form, measured_forms
from skink.settings import settings

aten = torch.ops.aten

# What another form must save before it is taken, as a share of the time: below lies the noise of measuring.
_MARGIN = 0.1


@dataclass(frozen=True)
class Decision:
    """How one factored layer runs.

    Args:
        node: its last node.
        op: name of the op that it may be fused to.
        form: `fused` is one kernel, `products` the layers as before, `dense` their product in one layer.
        refused: other forms, or kernels, each with its reason.
    """

    node: str
    op: str
    form: Form
    refused: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Target:
    """What a program is lowered for: see `skink.passes.lower.lower`.

    Args:
        device: where it will run.
        dtype: what the trained weights will be in; None: their present dtype.
        training: leave all layers as they are: the kernels have no gradients.
        dense: whether a layer may be multiplied out, which costs memory.
        keep: names of nodes that must stay.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    training: bool = False
    dense: bool = False
    keep: frozenset[str] = frozenset()


def choose_form(
    place: str, op: OpDef, factors: Mapping[str, fx.Node | None], program: Program, target: Target, *, pivoted: bool
) -> Decision:
    """The quickest form of one factored layer.

    Args:
        place: names its last node.
        op: what it may be fused to.
        factors: the nodes of its stored operands by the op's names; first the one that reads the input.
        program: holds their values.
        target: what is lowered for.
        pivoted: whether the results of the first factor are outputs as well.
    """
    first, second = (node.meta["val"] for node in list(factors.values())[:2] if node is not None)
    (rank, in_), others = map(int, first.shape), int(second.shape[0])
    out = others + rank if pivoted else others
    dtype = target.dtype or first.dtype
    call: dict[str, Tensor | None] = {"input": torch.empty(1, in_, dtype=dtype, device="meta")}
    call |= {name: _as_lowered(node, dtype) for name, node in factors.items()}
    variant, refused = op.choose(OpCall(call, target.device), training=target.training)
    if variant is None:
        return Decision(place, op.name, "products", refused)
    if settings().break_even == "off" or not _is_present(target.device):
        return Decision(place, op.name, "fused", refused)
    measured = min(rounded(rank), out - 1) if pivoted else rounded(rank)
    times = measured_forms(1, out, in_, measured, dtype, target.device, pivoted=pivoted)
    best: Form = "products" if times["products"] < (1 - _MARGIN) * times["fused"] else "fused"
    if best == "products":
        reason = f"{_micros(times['fused'])} for one token, two products take {_micros(times['products'])}"
        refused = (*refused, (variant.name, reason))
    if not target.dense:
        return Decision(place, op.name, best, refused)
    dense = measured_forms(1, out, in_, None, dtype, target.device)["dense"]
    if dense >= (1 - _MARGIN) * times[best]:
        reason = f"{_micros(dense)} for one token, {best} takes {_micros(times[best])}"
        return Decision(place, op.name, best, (*refused, ("dense", reason)))
    if any(program.weight(str(node.target)).is_meta for node in factors.values() if node is not None):
        return Decision(place, op.name, best, (*refused, ("dense", "the weights' values are not at hand")))
    reason = f"{_micros(times[best])} for one token, the dense layer takes {_micros(dense)}"
    return Decision(place, op.name, "dense", (*refused, (variant.name if best == "fused" else best, reason)))


def is_linear(node: Any) -> bool:
    """Whether a node is a linear layer."""
    return isinstance(node, fx.Node) and node.target is aten.linear.default


def rounded(rank: int) -> int:
    """The next rank that is measured: eight to an octave, since ranks of a model are many and times change slowly."""
    step = max(1, 1 << max(0, rank.bit_length() - 4))
    return -(-rank // step) * step


def _as_lowered(node: fx.Node | None, dtype: torch.dtype) -> Tensor | None:
    if node is None:
        return None
    value = node.meta["val"]
    return torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype, device="meta")


def _is_present(device: torch.device) -> bool:
    found = torch.accelerator.current_accelerator()
    return device.type == "cpu" or (found is not None and found.type == device.type)


def _micros(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs"
