"""How a factored layer runs: fused, as the products that it is, or multiplied out; whichever is quickest for one token.

It depends on the machine, so it is measured, once for each shape (`skink.kernels.low_rank_linear.break_even`). Exact:
the forms differ in rounding alone. Which nodes are such a layer, each kind says in a file of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from skink.graph.emit import linear_owner
from skink.graph.pattern import Call, Match, NoMatch, Rule
from skink.graph.program import Program
from skink.graph.rewriter import Rewriter, describe
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


@dataclass(frozen=True)
class Layers:
    """The nodes of one factored layer.

    Args:
        x: what it reads.
        linears: its two linear layers, the one that reads `x` first.
        operands: what is stored, by the op's names, the factors first; None for what it has not.
    """

    x: fx.Node
    linears: tuple[fx.Node, fx.Node]
    operands: Mapping[str, fx.Node | None]


@dataclass
class FactoredLayers(ABC):
    """The rules for one kind of factored layer in one program, and what they decided about each, by its last node.

    Attributes:
        op: what it may be fused to.
        kind: its name in those of rules.
        patterns: that it may match, each with its last node as the root.
        pivoted: whether the results of the first linear layer are outputs as well.
        owners: under what `skink.graph.emit` looks for the modules behind a fused layer.
    """

    program: Program
    target: Target
    decisions: dict[fx.Node, Decision] = field(default_factory=dict)

    op: ClassVar[OpDef]
    kind: ClassVar[str]
    patterns: ClassVar[tuple[Callable[..., Call], ...]]
    pivoted: ClassVar[bool]
    owners: ClassVar[str]

    @abstractmethod
    def layers(self, found: Match) -> Layers | None:
        """The nodes of a match; None where a cast lies between them."""

    @abstractmethod
    def dense(self, rewriter: Rewriter, layers: Layers) -> Sequence[fx.Node]:
        """Weight, and bias where there is one, of the linear layer that is all of it."""

    def refuses(self, found: Match, layers: Layers) -> str | None:
        """Why a match is not of this kind after all."""
        stored = [node for node in layers.operands.values() if node is not None]
        if any(node.op != "get_attr" for node in stored):
            return "a factor, a bias or the order is not read as it is stored"
        values = [node.meta["val"] for node in (found.root, layers.x, *stored)]
        if len({value.dtype for value in values if value.is_floating_point()}) > 1:
            return "the layers have more than one dtype"
        rank, in_, out = _sizes(layers.operands, self.pivoted)
        if rank >= min(in_, out):
            return "the product is not of low rank"
        if any(node.name in self.target.keep for node in found.nodes):
            return "a node of the layers is asked for"
        return None

    def rules(self) -> list[Rule]:
        """Rules that fuse such layers, or multiply them out."""
        fuse, multiply = f"fuse-{self.kind}", f"multiply-{self.kind}-out"
        return [
            rule
            for pattern in self.patterns
            for rule in (
                Rule(fuse, pattern=pattern, check=self._check("fused"), rewrite=self._fuse, exclusive=True),
                Rule(multiply, pattern=pattern, check=self._check("dense"), rewrite=self._multiply, exclusive=True),
            )
        ]

    def _check(self, form: Form) -> Callable[[Match], NoMatch | None]:
        """A rule's check: whether a match is of this kind, and `form` is how it should run."""

        def check(found: Match) -> NoMatch | None:
            layers = self.layers(found)
            if layers is None:
                return NoMatch("a cast lies between the layers", found.root)
            reason = self.refuses(found, layers)
            if reason is not None:
                return NoMatch(reason, found.root)
            if found.root not in self.decisions:
                place, factors = describe(found.root), layers.operands
                chosen = choose_form(place, self.op, factors, self.program, self.target, pivoted=self.pivoted)
                self.decisions[found.root] = chosen
            best = self.decisions[found.root].form
            return None if best == form else NoMatch(f"runs better as {best}", found.root)

        return check

    def _fuse(self, rewriter: Rewriter, found: Match) -> fx.Node:
        """One op in the place of the layers."""
        layers = self._checked(found)
        operands = list(layers.operands.values())
        while operands[-1] is None:
            operands.pop()
        node = rewriter.call(self.op.overload, layers.x, *operands, rule=f"fuse-{self.kind}")
        node.meta["refused"] = self.decisions[found.root].refused
        # So that a layer which PEFT or a user swaps for another is the one that runs: see emit.py.
        owners = tuple(linear_owner(rewriter.program, linear) for linear in layers.linears)
        if None not in owners:
            node.meta[self.owners] = owners
        return node

    def _multiply(self, rewriter: Rewriter, found: Match) -> fx.Node:
        layers = self._checked(found)
        stored = self.dense(rewriter, layers)
        return rewriter.call(aten.linear.default, layers.x, *stored, rule=f"multiply-{self.kind}-out")

    def _checked(self, found: Match) -> Layers:
        layers = self.layers(found)
        if layers is None:
            raise TypeError(f"{describe(found.root)} was refused")
        return layers


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
    rank, in_, out = _sizes(factors, pivoted)
    dtype = target.dtype or next(node.meta["val"].dtype for node in factors.values() if node is not None)
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


def bias_of(linear: fx.Node) -> fx.Node | None:
    """The node of a linear layer's bias, if it has one."""
    bias = linear.args[2] if len(linear.args) > 2 else None
    return bias if isinstance(bias, fx.Node) else None


def _sizes(factors: Mapping[str, fx.Node | None], pivoted: bool) -> tuple[int, int, int]:
    """Rank, inputs and outputs of the product of the first two, where the rank is of the first."""
    first, second = (node.meta["val"] for node in list(factors.values())[:2] if node is not None)
    (rank, in_), others = map(int, first.shape), int(second.shape[0])
    return rank, in_, others + rank if pivoted else others


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
