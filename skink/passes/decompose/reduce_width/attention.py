"""Attention and the projections around it: which row of which weight is which feature of which head.

    y = linear(x)  ->  heads [B, H, T, D]  ->  perhaps rotary  ->  attention  ->  [B, T, H Dv]  ->  linear

What lies between is followed by sending numbers through it: each output of the projection carries its own number, and
where it comes out says which head and which feature it is. So any way of cutting and folding a fused projection is
understood, and whatever computes anything in between is refused.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from skink.graph.passes import linear_weight
from skink.graph.pattern import op_name
from skink.graph.program import Program
from skink.kernels import find_op

aten = torch.ops.aten

_RESHAPES = frozenset({"reshape", "view", "_unsafe_view", "flatten", "unflatten"})
_MOVES = frozenset(
    {"transpose", "permute", "contiguous", "clone", "slice", "narrow", "select", "split", "split_with_sizes", "chunk",
     "squeeze", "unsqueeze", "unbind"}
)  # fmt: skip


@dataclass(frozen=True)
class Branch:
    """How queries, keys or values are made.

    Args:
        linear: the projection.
        weight: its name.
        bias: its name, empty where there is none.
        rows: int64[H, D]: the output of the projection that is feature d of head h.
        factor: what all of them are multiplied by.
        rotary: the rotary call that they pass last, if any.
        lead: batch and time as the graph gives them to a reshape into heads.
        nodes: all calls from the projection to the last before attention.
    """

    linear: fx.Node
    weight: str
    bias: str
    rows: Tensor
    factor: float
    rotary: fx.Node | None
    lead: tuple[Any, Any]
    nodes: frozenset[fx.Node]


@dataclass(frozen=True)
class Attention:
    """One attention with its projections.

    Args:
        node: the call.
        query, key, value: what it reads; a reason, in words, where that cannot be narrowed.
        output: the projection after it; a reason, in words, where that cannot be narrowed.
        columns: int64[H, Dv]: the input of `output` that is feature d of head h.
        folding: the calls between attention and `output`.
    """

    node: fx.Node
    query: Branch | str
    key: Branch | str
    value: Branch | str
    output: fx.Node | str
    columns: Tensor
    folding: tuple[fx.Node, ...]

    def given(self, name: str) -> fx.Node:
        """What attention reads as `query`, `key` or `value`."""
        node: fx.Node = _bound(self.node)[name]
        return node

    @property
    def fused(self) -> bool:
        """Whether one projection makes two or three of queries, keys and values."""
        linears = [entry.linear for entry in (self.query, self.key, self.value) if isinstance(entry, Branch)]
        return len(set(linears)) < len(linears)

    def scores_reason(self) -> str:
        """Why queries and keys cannot be narrowed; empty where they can."""
        reason = next((entry for entry in (self.query, self.key) if isinstance(entry, str)), "")
        if not reason and isinstance(self.query, Branch) and isinstance(self.key, Branch):
            reason = _rotary_reason(self.query.rotary, self.key.rotary)
            if self.query.linear.args[0] is not self.key.linear.args[0]:
                reason = "queries and keys are made of different inputs"
        return reason or self._fused_reason()

    def value_reason(self) -> str:
        """Why values cannot be narrowed; empty where they can."""
        reason = next((entry for entry in (self.value, self.output) if isinstance(entry, str)), "")
        return reason or self._fused_reason()

    def _fused_reason(self) -> str:
        if not self.fused:
            return ""
        linears = {entry.linear for entry in (self.query, self.key, self.value) if isinstance(entry, Branch)}
        broken = next((entry for entry in (self.query, self.key, self.value) if isinstance(entry, str)), "")
        if broken:
            return f"one projection makes queries, keys and values, and {broken}"
        return "" if len(linears) == 1 else "two of queries, keys and values come from one projection"


def attentions(program: Program) -> Iterator[Attention]:
    """Every attention of a canonical program, in the graph's order."""
    for node in program.graph.nodes:
        op = find_op(node.target)
        if op is None or op.name != "attention":
            continue
        given = op.bind(node.args, node.kwargs)
        branches = [_branch(program, node, given[name]) for name in ("query", "key", "value")]
        inner: set[fx.Node] = set()
        for entry in branches:
            if isinstance(entry, Branch):
                inner |= entry.nodes
        query, key, value = (_alone(entry, inner | {node}) for entry in branches)
        output, columns, folding = _output(program, node)
        yield Attention(node, query, key, value, output, columns, folding)


def pairs(branch: Branch) -> tuple[list[tuple[int, ...]], int]:
    """The features that rotary turns together, as pairs of columns, and how many features it turns."""
    if branch.rotary is None:
        return [], 0
    given = _bound(branch.rotary)
    width = int(given["cos"].meta["val"].shape[-1])
    if given["interleaved"]:
        return [(i, i + 1) for i in range(0, width, 2)], width
    return [(i, i + width // 2) for i in range(width // 2)], width


def _bound(node: fx.Node) -> Mapping[str, Any]:
    op = find_op(node.target)
    if op is None:
        raise TypeError(f"{node.target} is no op of Skink's")
    return op.bind(node.args, node.kwargs)


def _rotary_reason(query: fx.Node | None, key: fx.Node | None) -> str:
    if (query is None) != (key is None):
        return "queries and keys are not turned alike"
    if query is None or key is None:
        return ""
    first, second = _bound(query), _bound(key)
    alike = all(first[name] == second[name] for name in ("cos", "sin", "interleaved"))
    return "" if alike else "queries and keys are not turned by the same tables"


def _branch(program: Program, attention: fx.Node, node: fx.Node) -> Branch | str:
    rotary = None
    op = find_op(node.target)
    if op is not None and op.name == "rotary":
        rotary, node = node, _bound(node)["input"]
    chain: list[fx.Node] = []
    while node.target is not aten.linear.default:
        name = op_name(node)
        known = node.op == "call_function" and (
            name in _RESHAPES or name in _MOVES or node.target is operator.getitem or _factor(node) is not None
        )
        if not known or not isinstance(node.args[0], fx.Node):
            return f"{_called(node)} stands between the projection and attention"
        chain.append(node)
        node = node.args[0]
    chain.reverse()
    weight = linear_weight(program, node)
    bias = _bias(node)
    if weight is None or bias is None:
        return "the projection's weight is computed"
    rows = _follow(node, chain)
    lead = _lead(chain)
    if rows is None or lead is None or rows[1].dim() != 2:
        return "heads are not folded out of the projection as [B, T, H, D]"
    factor = prod(value for entry in chain if (value := _factor(entry)) is not None)
    inner = frozenset({node, *chain, *([rotary] if rotary is not None else [])})
    return Branch(node, weight, bias, rows[1], float(factor), rotary, lead, inner)


def _alone(branch: Branch | str, inner: set[fx.Node]) -> Branch | str:
    """The branch, unless something else reads what is computed in it."""
    if isinstance(branch, Branch):
        # In the graph's order, so that the reason is the same every time.
        for node in sorted(branch.nodes):
            reader = next((user for user in node.users if user not in inner), None)
            if reader is not None:
                return f"{_called(reader)} reads the projection too"
    return branch


def _output(program: Program, attention: fx.Node) -> tuple[fx.Node | str, Tensor, tuple[fx.Node, ...]]:
    nothing = torch.empty(0, 0, dtype=torch.int64)
    chain: list[fx.Node] = []
    node = attention
    while True:
        if len(node.users) != 1:
            return "attention's result is read more than once", nothing, ()
        user = next(iter(node.users))
        if user.target is aten.linear.default and user.args[0] is node:
            break
        if op_name(user) not in _RESHAPES | {"transpose", "permute", "contiguous", "clone"}:
            return f"{_called(user)} stands between attention and the projection after it", nothing, ()
        chain.append(user)
        node = user
    if linear_weight(program, user) is None or _bias(user) is None:
        return "the weight of the projection after attention is computed", nothing, ()
    followed = _follow(attention, chain)
    if followed is None or not chain or op_name(chain[-1]) not in _RESHAPES:
        return "heads are not joined as [B, T, H D] after attention", nothing, ()
    [features] = followed[1:]
    heads, width = followed[0]
    columns = torch.empty(heads * width, dtype=torch.int64)
    columns[features.flatten()] = torch.arange(heads * width)
    return user, columns.view(heads, width), tuple(chain)


def _follow(start: fx.Node, chain: Sequence[fx.Node]) -> tuple[tuple[int, int], Tensor] | None:
    """Where the features of `start` come out at the end of a chain of calls that move numbers about.

    Returns:
        (heads, width) of `start` where it is attention, else (1, out); and the number of the feature at each place of
        the end's result, without batch and time: int64[H, D] or int64[H D]. None where tokens do not stay together.
    """
    sizes: dict[Any, int] = {}
    shape = [_concrete(size, sizes) for size in start.meta["val"].shape]
    by_head = find_op(start.target) is not None
    heads, width = (shape[1], shape[3]) if by_head else (1, shape[-1])
    tokens = prod(shape) // (heads * width)
    value: Any = torch.arange(prod(shape)).view(tokens, heads * width)
    value = value.view(shape[0], shape[2], heads, width).transpose(1, 2) if by_head else value.view(shape)
    for node in chain:
        if op_name(node) in _RESHAPES:
            wanted = [_concrete(size, sizes) for size in node.meta["val"].shape]
            if prod(wanted) != value.numel():
                return None
            value = value.reshape(wanted)
        elif _factor(node) is None:
            if any(isinstance(argument, fx.Node) for argument in node.all_input_nodes[1:]):
                return None
            value = node.target(value, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    if value.dim() == 4 and not by_head:
        value = value.transpose(1, 2)
        value = value.reshape(tokens, *value.shape[2:]) if prod(value.shape[:2]) == tokens else None
    elif by_head and prod(value.shape[:-1]) == tokens:
        value = value.reshape(tokens, -1)
    else:
        value = None
    if value is None:
        return None
    first = value[0]
    steps = torch.arange(tokens).view(-1, *([1] * first.dim())) * (heads * width)
    return ((heads, width), first) if torch.equal(value, first + steps) else None


def _concrete(size: Any, sizes: dict[Any, int]) -> int:
    """A size with a small number for each symbol, the same at every call with the same `sizes`."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    for symbol in sorted(expression.free_symbols, key=str):
        sizes.setdefault(symbol, len(sizes) + 2)
    return int(expression.subs(sizes))


def _lead(chain: Sequence[fx.Node]) -> tuple[Any, Any] | None:
    """Batch and time as the first reshape of a chain into heads has them."""
    for node in chain:
        if op_name(node) in ("reshape", "view", "_unsafe_view"):
            sizes, shape = node.args[1], node.meta["val"].shape
            if isinstance(sizes, list | tuple) and len(shape) >= 4 and len(sizes) == len(shape):
                return sizes[0], sizes[1]
    return None


def _factor(node: fx.Node) -> float | None:
    """The number that a call multiplies by, where it does nothing else."""
    if op_name(node) in ("mul", "div") and len(node.args) == 2 and isinstance(node.args[1], int | float):
        return float(node.args[1]) if op_name(node) == "mul" else 1 / float(node.args[1])
    return None


def _bias(node: fx.Node) -> str | None:
    """The name of a linear layer's bias, empty where there is none; None where it is computed."""
    bias = node.args[2] if len(node.args) > 2 else None
    if bias is None:
        return ""
    return str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def _called(node: fx.Node) -> str:
    op = find_op(node.target)
    return op.name if op is not None else op_name(node) or node.name
