"""Convolutions in Tucker's form: two thin ones of kernel 1 around one between fewer channels.

    y = W * x + b   ->   y = U_out * (core * (U_in^T * x)) + b

    W: [out, in, k...]   U_in^T: [R_in, in, 1...]   core: [R_out, R_in, k...]   U_out: [out, R_out, 1...]

The core has the stride, the padding and the dilation of the convolution. That is Tucker's form of the two channel
modes; the modes of the kernel are short and stay whole (Kim et al. 2016, arXiv 1511.06530, section 3.1). A channel mode
whose rank would be its size stays whole too, and its factor is left out.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from skink.graph.passes import LayerRecord
from skink.graph.program import Program
from skink.graph.rewriter import Rewriter
from skink.passes.decompose.replacement import free_prefix
from skink.passes.decompose.selection import CUT_SHORT
from skink.passes.decompose.tucker.tensor import Tucker, relative_error, tucker

aten = torch.ops.aten

RULE = "convolution-to-tucker"

_TRANSPOSED = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input})
_CONVOLUTIONS = _TRANSPOSED | {
    aten.convolution.default,
    *(overload for op in (aten.conv1d, aten.conv2d, aten.conv3d) for overload in (op.default, op.padding)),
}
_POINTWISE = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


@dataclass(frozen=True)
class Convolution:
    """A stored kernel that convolutions read.

    Args:
        weight: its qualified name.
        shape: (out, in of one group, kernel...); of a transposed one (in, out of one group, kernel...).
        readers: the convolutions that read it, in the graph's order.
        others: every other node that reads it.
    """

    weight: str
    shape: tuple[int, ...]
    readers: tuple[fx.Node, ...]
    others: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        """The layer's qualified name: the weight's, less `.weight`."""
        return self.weight.removesuffix(".weight")

    @property
    def parameters(self) -> int:
        """Parameters of the kernel."""
        return math.prod(self.shape)

    def structural_reason(self) -> str | None:
        """Why the graph speaks against factoring it, if it does."""
        if self.others:
            return "the weight is tied: something that is no convolution reads it too"
        for node in self.readers:
            given = _arguments(node)
            if node.target in _TRANSPOSED or given.get("transposed", False):
                return "it is a transposed convolution"
            if (groups := given.get("groups", 1)) != 1:
                return f"it has {groups} groups, and mixes no channel of one with those of another"
            if any(_is_thin(one) for one in (node, *node.users, given["input"])):
                return "it is already one of several thin factors"
        return None

    def record(self, decision: str, after: int, **more: float | int | str | None) -> LayerRecord:
        """A row of the report; `after`: parameters afterwards."""
        return LayerRecord(
            name=self.name,
            kind="convolution",
            shape=self.shape,
            decision=decision,
            parameters_before=self.parameters,
            parameters_after=after,
            **more,  # type: ignore[arg-type]
        )


def convolutions(program: Program) -> list[Convolution]:
    """Every stored kernel that a convolution reads, in the graph's order."""
    readers: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.target in _CONVOLUTIONS:
            weight = node.args[1]
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                readers.setdefault(str(weight.target), []).append(node)
    users: dict[str, list[fx.Node]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        users.setdefault(str(node.target), []).extend(node.users)
    return [
        Convolution(
            weight=name,
            shape=tuple(program.weight(name).shape),
            readers=tuple(nodes),
            others=tuple(user for user in users[name] if user not in nodes),
        )
        for name, nodes in readers.items()
    ]


def tucker_parameters(shape: tuple[int, ...], rank_out: int, rank_in: int) -> int:
    """Parameters of a kernel in Tucker's form at these ranks; a rank that is its mode's size leaves that mode whole."""
    thin = sum(size * rank for size, rank in zip(shape, (rank_out, rank_in), strict=False) if rank < size)
    return thin + rank_out * rank_in * math.prod(shape[2:])


def ranks_within(keep: float, shape: tuple[int, ...]) -> tuple[int, int]:
    """The largest ranks (out, in), in proportion to the channels, whose factors hold at most the share `keep`.

    (0, 0) where not even rank 1 does.
    """
    for out, in_ in _proportional(shape[0], shape[1]):
        if tucker_parameters(shape, out, in_) <= keep * math.prod(shape) + 1e-9:
            return out, in_
    return 0, 0


def _proportional(out: int, in_: int) -> Iterator[tuple[int, int]]:
    most = max(out, in_)
    for step in range(most, 0, -1):
        yield max(1, step * out // most), max(1, step * in_ // most)


def replace_convolution(
    program: Program, rewriter: Rewriter, layer: Convolution, rank_out: int, rank_in: int, iterations: int
) -> LayerRecord:
    """Put Tucker's form in the place of every reader of a kernel: one edit for each, where the limit allows it.

    Factors are named `conv.down.weight`, `conv.core.weight` and `conv.up.weight`; the bias keeps its name.

    Args:
        program: what is edited.
        rewriter: edits it.
        layer: which kernel; nothing speaks against it.
        rank_out: 1 to its output channels.
        rank_in: 1 to its input channels.
        iterations: of HOOI.
    """
    weight = program.weight(layer.weight)
    sizes = (rank_out, rank_in)
    ranks = [rank if rank < size else None for rank, size in zip(sizes, layer.shape, strict=False)]
    found = tucker(weight, [*ranks, *([None] * (weight.dim() - 2))], iterations=iterations)
    stored = Tucker(
        found.core.to(weight.dtype).contiguous(),
        tuple(factor.to(weight.dtype).contiguous() if factor is not None else None for factor in found.factors),
    )
    error = relative_error(weight.double(), _in_float64(stored).tensor())
    prefix, is_buffer = free_prefix(program, layer.weight), layer.weight in program.buffers
    with rewriter.before(layer.readers[0]):
        core = rewriter.weight(f"{prefix}core.weight", stored.core, buffer=is_buffer)
        down = _thin(rewriter, f"{prefix}down.weight", stored.factors[1], weight.dim(), True, is_buffer)
        up = _thin(rewriter, f"{prefix}up.weight", stored.factors[0], weight.dim(), False, is_buffer)
    detail = f"ranks {rank_out} of {layer.shape[0]} and {rank_in} of {layer.shape[1]}, relative error {error:.4g}"
    done = [_replace(rewriter, node, down, core, up, detail) for node in layer.readers]
    program.drop_unused_weights()
    if not all(done):
        return layer.record("kept dense", layer.parameters, reason=CUT_SHORT)
    after = stored.core.numel() + sum(factor.numel() for factor in stored.factors if factor is not None)
    return layer.record("factored", after, rank=min(sizes), weight_error=error)


def _thin(
    rewriter: Rewriter, name: str, factor: Tensor | None, dims: int, transposed: bool, is_buffer: bool
) -> fx.Node | None:
    """A factor [size, R] as the weight of a convolution of kernel 1."""
    if factor is None:
        return None
    matrix = factor.mT if transposed else factor
    return rewriter.weight(name, matrix.reshape(*matrix.shape, *[1] * (dims - 2)).contiguous(), buffer=is_buffer)


def _replace(
    rewriter: Rewriter, node: fx.Node, down: fx.Node | None, core: fx.Node, up: fx.Node | None, detail: str
) -> bool:
    given = _arguments(node)
    pointwise = _POINTWISE[core.meta["val"].dim() - 2]
    with rewriter.before(node):
        value = given["input"]
        if down is not None:
            value = rewriter.call(pointwise, value, down, rule=RULE)
        own = {**given, "input": value, "weight": core, "bias": given.get("bias") if up is None else None}
        value = rewriter.call(node.target, *_positional(node, own), rule=RULE)
        if up is not None:
            bias = given.get("bias")
            value = rewriter.call(pointwise, value, up, *([bias] if bias is not None else []), rule=RULE)
    done = rewriter.replace(node, value, rule=RULE, detail=detail)
    rewriter.erase_dead(node)
    return done


def _is_thin(node: fx.Node) -> bool:
    """Whether a node is a convolution of kernel 1 to or from fewer channels, right before or after another one."""
    if node.target not in _CONVOLUTIONS:
        return False
    out, in_, *kernel = node.args[1].meta["val"].shape  # type: ignore[union-attr]
    if any(size != 1 for size in kernel):
        return False
    before = isinstance(node.args[0], fx.Node) and node.args[0].target in _CONVOLUTIONS
    after = any(user.target in _CONVOLUTIONS for user in node.users)
    return bool((out < in_ and after) or (in_ < out and before))


def _arguments(node: fx.Node) -> dict[str, Any]:
    """What a call was given, by the names of its op's arguments."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _positional(node: fx.Node, given: Mapping[str, Any]) -> list[Any]:
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    last = max(place for place, argument in enumerate(arguments) if argument.name in given)
    return [given.get(argument.name, argument.default_value) for argument in arguments[: last + 1]]


def _in_float64(form: Tucker) -> Tucker:
    return Tucker(form.core.double(), tuple(None if factor is None else factor.double() for factor in form.factors))
