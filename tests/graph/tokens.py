"""Ground truth for token mixing: each node is run again with one token put in another's place."""

from typing import Any

import torch
from torch import Tensor, fx

from skink.graph.mixing import TokenMixing, token_mixing
from skink.graph.program import Program
from skink.graph.propagate import shape_context
from skink.graph.token_axis import TokenAxis


class _Recorder(fx.Interpreter):
    """Keeps the value of every node."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = value
        return value

    def record(self, *inputs: Tensor) -> dict[fx.Node, Any]:
        self.values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            self.run(*inputs)
        return self.values


def places(axis: TokenAxis, value: Tensor, length: int) -> Tensor:
    """The token of each index of the token axis."""
    return torch.arange(value.shape[axis.index]) // int(axis.inner) % length


def swapped(value: Tensor, axis: TokenAxis, token: int, other: int, length: int) -> Tensor:
    """`value` with the content of `other` where `token` was."""
    where = places(axis, value, length)
    result = value.clone()
    into, out = (torch.nonzero(where == entry)[:, 0] for entry in (token, other))
    result.index_copy_(axis.index, into, value.index_select(axis.index, out))
    return result


def check_by_execution(program: Program, inputs: list[Tensor], *, length: int, token: int = 1) -> TokenMixing:
    """Every node that is proven to treat tokens by themselves does so on `inputs`; returns the analysis."""
    mixing = token_mixing(program)
    assert shape_context(program).names
    values = _Recorder(program.graph_module).record(*inputs)
    checked = 0
    for node in program.graph.nodes:
        if node.op != "call_function" or node in mixing.mixes or node in mixing.known:
            continue
        sources = [s for s in node.all_input_nodes if s not in mixing.mixes]
        if not any(mixing.token_axis(source) for source in sources) and not any(mixing.axes.get(node, ())):
            continue
        if not isinstance(values[node], Tensor | tuple | list):
            continue
        changed = {
            source: _changed(values[source], mixing.axes[source], token, length)
            for source in sources
            if any(mixing.axes.get(source, ()))
        }
        again = node.target(
            *fx.map_arg(node.args, lambda n, c=changed: c.get(n, values[n])),
            **fx.map_arg(dict(node.kwargs), lambda n, c=changed: c.get(n, values[n])),
        )
        for axis, before, after in zip(mixing.axes[node], _tensors(values[node]), _tensors(again), strict=True):
            if axis is None:
                assert torch.equal(before, after), f"{node} changed, and has no tokens"
                continue
            kept = torch.nonzero(places(axis, before, length) != token)[:, 0]
            pair = (entry.index_select(axis.index, kept) for entry in (before, after))
            torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-6, msg=f"{node} mixes tokens", equal_nan=True)
            checked += 1
    assert checked
    return mixing


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [entry for entry in value if isinstance(entry, Tensor)]


def _changed(value: Any, axes: Any, token: int, length: int) -> Any:
    if isinstance(value, Tensor):
        return swapped(value, axes[0], token, token + 1, length)
    return [
        swapped(entry, axis, token, token + 1, length) if axis is not None else entry
        for entry, axis in zip(value, axes, strict=True)
    ]
