"""The edits: the same calls with narrower weights. Each block is one edit, and every weight keeps its name.

    feed-forward    the block's calls again, reading fewer rows of gate and up, and the new down
    attention       projections, folding, rotary, attention and the output projection again, at other head widths

Where features that rotary turns go, the tables lose the same columns: two calls for each layer, on [B, T, R]. A fused
projection is cut as [queries; keys; values] afterwards, in one split.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from skink.graph.blocks import FeedForward
from skink.graph.passes import linear_weight
from skink.graph.pattern import op_name
from skink.graph.program import Program
from skink.graph.rewriter import Rewriter
from skink.kernels import find_op
from skink.passes.decompose.reduce_width.attention import Attention, Branch

aten = torch.ops.aten

RULE = "narrow-{}"
_CUTS = frozenset({"split", "split_with_sizes", "slice"})


@dataclass(frozen=True)
class Heads:
    """What becomes of queries, keys or values.

    Args:
        weight: [heads * width, in], head after head.
        bias: [heads * width], or None.
        heads: how many.
    """

    weight: Tensor
    bias: Tensor | None
    heads: int

    @property
    def width(self) -> int:
        """Features of each head."""
        return self.weight.shape[0] // self.heads


def narrow_feed_forward(
    program: Program, rewriter: Rewriter, block: FeedForward, weights: Mapping[str, Tensor], width: int, detail: str
) -> bool:
    """Give a block other weights, by name, of an inner width that is smaller.

    Returns:
        False where the rewriter's limit refuses the edit; then nothing has changed.
    """
    if rewriter.exhausted:
        return False
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    last = block.output
    values: dict[fx.Node, fx.Node] = {}
    with rewriter.before(last):
        read = {name: _weight(program, rewriter, name, tensor) for name, tensor in weights.items()}
        for node in sorted(block.nodes, key=order.__getitem__):
            if node.op != "call_function":
                continue
            args = fx.map_arg(node.args, lambda entry: values.get(entry, entry))
            if linear_weight(program, node) is not None:
                args = (args[0], *(_stored(entry, read) for entry in args[1:]))
            elif op_name(node) in _CUTS:
                args = _cut(node, args, block.width, width)
            values[node] = rewriter.call(node.target, *args, rule=RULE.format("feed-forward"), **node.kwargs)
    done = rewriter.replace(last, values[last], rule=RULE.format("feed-forward"), detail=detail)
    _sweep(program, rewriter, last)
    return done


def narrow_attention(
    program: Program,
    rewriter: Rewriter,
    block: Attention,
    parts: Mapping[str, Heads],
    output: Tensor | None,
    table: Tensor | None,
    detail: str,
) -> bool:
    """Give an attention narrower heads.

    Args:
        program: what is edited.
        rewriter: edits it.
        block: where.
        parts: of `query`, `key` and `value`, those that change; all three where one projection makes them.
        output: the weight of the projection after it, [out, H Dv] with head after head; None: as it is.
        table: int64: which columns of the rotary tables stay; None: all.
        detail: for the log.

    Returns:
        False where the rewriter's limit refuses the edit; then nothing has changed.
    """
    if rewriter.exhausted:
        return False
    op = find_op(block.node.target)
    given = dict(op.bind(block.node.args, block.node.kwargs)) if op is not None else {}
    branches = {name: branch for name in parts if isinstance(branch := getattr(block, name), Branch)}
    rule = RULE.format("attention")
    # With values as wide as before, nothing after attention changes.
    last = block.output if output is not None and isinstance(block.output, fx.Node) else block.node
    with rewriter.before(last):
        made = _projected(program, rewriter, block, branches, parts, rule)
        tables = _Tables(program, rewriter, table)
        for name, branch in branches.items():
            heads = made[name]
            if branch.rotary is not None:
                heads = tables.turn(branch, heads, rule)
            given[name] = heads
        names = [argument.name for argument in block.node.target._schema.arguments]  # type: ignore[union-attr]
        args = tuple(given.get(name) for name in names[: len(block.node.args)])
        kwargs = {name: given[name] for name in block.node.kwargs}
        node = rewriter.call(block.node.target, *args, rule=rule, **kwargs)
        if output is not None:
            for fold in block.folding:
                node = rewriter.call(fold.target, node, *_folded(fold, node), rule=rule, **fold.kwargs)
            name = str(last.args[1].target)  # type: ignore[union-attr]
            read = {name: _weight(program, rewriter, name, output)}
            node = rewriter.call(last.target, node, *(_stored(entry, read) for entry in last.args[1:]), rule=rule)
    done = rewriter.replace(last, node, rule=rule, detail=detail)
    _sweep(program, rewriter, last)
    return done


def _projected(
    program: Program,
    rewriter: Rewriter,
    block: Attention,
    branches: Mapping[str, Branch],
    parts: Mapping[str, Heads],
    rule: str,
) -> dict[str, fx.Node]:
    """The heads [B, H, T, D] of each part, before rotary."""
    flat: dict[str, fx.Node] = {}
    if block.fused:
        branch = next(iter(branches.values()))
        weight = torch.cat([parts[name].weight for name in branches])
        biases = [bias for name in branches if (bias := parts[name].bias) is not None]
        whole = _linear(program, rewriter, branch, weight, torch.cat(biases) if biases else None, rule)
        sizes = [parts[name].weight.shape[0] for name in branches]
        cut = rewriter.call(aten.split_with_sizes.default, whole, sizes, -1, rule=rule)
        for index, name in enumerate(branches):
            flat[name] = rewriter.call(operator.getitem, cut, index, rule=rule)
    else:
        for name, branch in branches.items():
            flat[name] = _linear(program, rewriter, branch, parts[name].weight, parts[name].bias, rule)
    made = {}
    for name, branch in branches.items():
        part = parts[name]
        folded = rewriter.call(aten.reshape.default, flat[name], [*branch.lead, part.heads, part.width], rule=rule)
        made[name] = rewriter.call(aten.transpose.int, folded, 1, 2, rule=rule)
    return made


def _linear(
    program: Program, rewriter: Rewriter, branch: Branch, weight: Tensor, bias: Tensor | None, rule: str
) -> fx.Node:
    read = [_weight(program, rewriter, branch.weight, weight)]
    if bias is not None:
        read.append(_weight(program, rewriter, branch.bias, bias))
    return rewriter.call(branch.linear.target, branch.linear.args[0], *read, rule=rule)


class _Tables:
    """The rotary tables without the columns that went; queries and keys share them."""

    def __init__(self, program: Program, rewriter: Rewriter, columns: Tensor | None) -> None:
        self._program, self._rewriter, self._columns = program, rewriter, columns
        self._found: dict[fx.Node, fx.Node] = {}

    def turn(self, branch: Branch, heads: fx.Node, rule: str) -> fx.Node:
        """The rotary call of a branch on other heads."""
        rotary = branch.rotary
        op = find_op(rotary.target) if rotary is not None else None
        if rotary is None or op is None:
            return heads
        given = dict(op.bind(rotary.args, rotary.kwargs))
        cos, sin = (self._narrowed(branch, given[name], rule) for name in ("cos", "sin"))
        kwargs = {"interleaved": True} if given["interleaved"] else {}
        return self._rewriter.call(rotary.target, heads, cos, sin, rule=rule, **kwargs)

    def _narrowed(self, branch: Branch, table: fx.Node, rule: str) -> fx.Node:
        if self._columns is None:
            return table
        if table not in self._found:
            owner = branch.weight.rpartition(".")[0].rpartition(".")[0]
            name = f"{owner}.rotary_columns" if owner else "rotary_columns"
            columns = self._rewriter.weight(name, self._columns.to(_device(self._program)), buffer=True)
            self._found[table] = self._rewriter.call(aten.index_select.default, table, -1, columns, rule=rule)
        return self._found[table]


def _device(program: Program) -> torch.device:
    return next((tensor.device for _, tensor in program.weights()), torch.device("cpu"))


def _folded(fold: fx.Node, value: fx.Node) -> Sequence[Any]:
    """The further arguments of a call between attention and its output projection, for heads of another width."""
    if op_name(fold) not in ("reshape", "view", "_unsafe_view"):
        return fold.args[1:]
    sizes = list(fold.args[1])  # type: ignore[arg-type]
    before, after = fold.args[0].meta["val"], fold.meta["val"]  # type: ignore[union-attr]
    if isinstance(sizes[-1], int) and sizes[-1] != -1 and int(after.shape[-1]) != int(before.shape[-1]):
        # Heads are joined here: H Dv becomes H times the new width.
        sizes[-1] = sizes[-1] // int(before.shape[-1]) * int(value.meta["val"].shape[-1])
    elif isinstance(sizes[-1], int) and sizes[-1] != -1:
        sizes[-1] = int(value.meta["val"].shape[-1])
    return [sizes]


def _cut(node: fx.Node, args: tuple[Any, ...], before: int, after: int) -> tuple[Any, ...]:
    """Arguments of the call that parts gate and up, for another width of each."""
    source, *rest = args
    if op_name(node) == "split_with_sizes" or isinstance(rest[0], list | tuple):
        return source, [after for _ in rest[0]], *rest[1:]
    if op_name(node) == "split":
        return source, after, *rest[1:]
    axis, start, _, *step = rest
    second = start is not None and start >= before
    return (source, axis, after if second else 0, 2 * after if second else after, *step)


def _weight(program: Program, rewriter: Rewriter, name: str, tensor: Tensor) -> fx.Node:
    old = program.weight(name)
    return rewriter.weight(name, tensor.to(old.dtype).contiguous(), buffer=name in program.buffers)


def _stored(argument: Any, read: Mapping[str, fx.Node]) -> Any:
    return read.get(str(argument.target), argument) if isinstance(argument, fx.Node) else argument


def _sweep(program: Program, rewriter: Rewriter, old: fx.Node) -> None:
    rewriter.erase_dead(old)
    program.drop_unused_weights()
