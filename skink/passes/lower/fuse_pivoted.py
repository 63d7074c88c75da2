"""Make `skink::pivoted_linear` of a linear layer, another that reads its results, and what puts both in order.

both = cat([z, linear(z, rest, b')], -1), z = linear(x, kept, b)   ->   skink.pivoted_linear(x, kept, rest, b, b')
index_select(both, -1, order)                                      ->   skink.pivoted_linear(..., order)
                                                                        linear(x, [kept; rest @ kept][order], ...)

The order is fused where one reader takes all that it wants of `both`; several keep their own. forms.py says which form
is taken.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from skink.graph.pattern import Call, Match, Weight, ops
from skink.graph.rewriter import Rewriter
from skink.kernels import PIVOTED_LINEAR
from skink.passes.lower.forms import FactoredLayers, Layers, bias_of, is_linear

aten = torch.ops.aten


def _unordered(x: Tensor, kept: Weight, rest: Weight) -> Call:
    z = ops.linear(x, kept, ...)
    return ops.cat([z, ops.linear(z, rest, ...)], ...)


def _ordered(x: Tensor, kept: Weight, rest: Weight, axis: int, order: Weight) -> Call:
    return ops.index_select(_unordered(x, kept, rest), axis, order)


class PivotedPairs(FactoredLayers):
    """A layer and another that reads its results, both joined, perhaps in another order."""

    op = PIVOTED_LINEAR
    kind = "pivoted"
    patterns = (_ordered, _unordered)
    pivoted = True
    owners = "pivoted_layers"

    def layers(self, found: Match) -> Layers | None:
        """See `FactoredLayers.layers`."""
        both, order = _joined(found)
        if both.target is not aten.cat.default:
            return None
        first, second = both.args[0]
        if not (is_linear(first) and is_linear(second) and second.args[0] is first):
            return None
        kept, rest = first.args[1], second.args[1]
        biases = {"kept_bias": bias_of(first), "rest_bias": bias_of(second)}
        return Layers(first.args[0], (first, second), {"kept": kept, "rest": rest, **biases, "order": order})

    def refuses(self, found: Match, layers: Layers) -> str | None:
        """See `FactoredLayers.refuses`."""
        both, order = _joined(found)
        if not all(_on_last_axis(node) for node in {both, found.root}):
            return "results are joined or chosen along another axis"
        if order is not None and order.meta["val"].dtype != torch.int64:
            return "the order is not of int64"
        if order is None and self._is_ordered(both):
            return "the order behind it belongs to the layer"
        return super().refuses(found, layers)

    def dense(self, rewriter: Rewriter, layers: Layers) -> Sequence[fx.Node]:
        """See `FactoredLayers.dense`."""
        names = {name: str(node.target) for name, node in layers.operands.items() if node is not None}
        read = {name: rewriter.program.weight(target) for name, target in names.items()}
        wide = torch.promote_types(read["kept"].dtype, torch.float32)

        def whole(kept: Tensor, others: Tensor) -> Tensor:
            both = torch.cat([kept, others])
            return (both[read["order"]] if "order" in read else both).to(read["kept"].dtype)

        kept, rest = read["kept"].to(wide), read["rest"].to(wide)
        biases = [
            read[name].to(wide) if name in read else kept.new_zeros(size)
            for name, size in (("kept_bias", len(kept)), ("rest_bias", len(rest)))
        ]
        operands = [rewriter.weight(f"{names['kept']}_multiplied_out", whole(kept, rest @ kept))]
        if {"kept_bias", "rest_bias"} & read.keys():
            bias = whole(biases[0], rest @ biases[0] + biases[1])
            operands.append(rewriter.weight(f"{names['kept']}_multiplied_out_bias", bias))
        return operands

    def _is_ordered(self, both: fx.Node) -> bool:
        """Whether the other pattern matches at the one reader of `both`."""
        if len(both.users) > 1:
            return False
        reader = next(iter(both.users))
        order: Any = reader.args[2] if reader.target is aten.index_select.default else None
        return (
            isinstance(order, fx.Node)
            and order.op == "get_attr"
            and order.meta["val"].dtype == torch.int64
            and _on_last_axis(reader)
            and reader.name not in self.target.keep
        )


def _joined(found: Match) -> tuple[Any, Any]:
    """The node that joins both results, and the order behind it, where that is matched too."""
    root = found.root
    return (root.args[0], root.args[2]) if root.target is aten.index_select.default else (root, None)


def _on_last_axis(node: fx.Node) -> bool:
    """Of a `cat` or an `index_select`: whether its axis is the last one."""
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    dims = node.meta["val"].dim()
    return isinstance(axis, int) and axis % dims == dims - 1
