"""Logits of the last tokens only: a prompt's others cost much and are rarely wanted."""

import torch
from torch import fx

from skink.graph.program import Program
from skink.kernels import RMS_NORM

aten = torch.ops.aten

# What may lie between the last layer and the logits and treats every token alike.
_TOKENWISE = frozenset(
    {
        RMS_NORM.overload,
        aten.layer_norm.default,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.mul.Scalar,
        aten.div.Scalar,
        aten.tanh.default,
        aten.to.dtype,
        aten.type_as.default,
        aten.alias.default,
    }
)


def head_input(program: Program) -> fx.Node:
    """The node [B, T, ...] after which every token is treated by itself, up to the logits [B, T, V]."""
    node: fx.Node = program.graph.output_node().args[0][0]  # type: ignore[index, assignment]
    while node.target is aten.linear.default or node.target in _TOKENWISE:
        below = node.args[0]
        alone = all(other is below or other.op == "get_attr" for other in node.all_input_nodes)
        if not isinstance(below, fx.Node) or not alone or len(below.users) != 1:
            break
        node = below
    return node


def last_token_only(program: Program, cut: fx.Node) -> Program:
    """The program with logits [B, 1, V] of the last token; what comes after `cut` is not computed for the others."""
    clone = program.clone()
    before = list(clone.graph.nodes)[list(program.graph.nodes).index(cut)]
    with clone.graph.inserting_after(before):
        last = clone.graph.call_function(aten.slice.Tensor, (before, 1, -1, torch.iinfo(torch.int64).max))
    before.replace_all_uses_with(last, delete_user_cb=lambda user: user is not last)
    clone.graph_module.recompile()
    return clone
