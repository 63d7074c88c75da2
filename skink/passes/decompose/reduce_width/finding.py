"""Which widths of a program can shrink, and why the others cannot."""

from collections.abc import Collection, Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, fx

from skink.graph.blocks import FeedForward, feed_forward_blocks
from skink.graph.calibration import counted_rows, real_tokens, token_batches
from skink.graph.passes import linear_weight
from skink.graph.pattern import op_name
from skink.graph.program import Program
from skink.graph.regions import run_regions
from skink.passes.decompose.reduce_width.attention import Attention, Branch, attentions
from skink.passes.decompose.reduce_width.parts import FeedForwardPart, Kind, Method, Part, ValuePart
from skink.passes.decompose.reduce_width.scores import ScorePart
from skink.passes.decompose.selection import Choice, LinearLayer


def find_parts(program: Program, choice: Choice, kinds: Collection[Kind], method: Method) -> list[Part]:
    """The parts whose layers may all be changed, in the graph's order; layers of no part leave the choice, with why.

    Args:
        program: canonical.
        choice: the layers that may be changed.
        kinds: which parts are wanted.
        method: see `ReduceWidth`.
    """
    finder = _Finder(program, choice, method)
    if "feed-forward" in kinds:
        for block in chain.from_iterable((block, *block.shared) for block in feed_forward_blocks(program)):
            finder.feed_forward(block)
    for attention in attentions(program):
        if "value-output" in kinds:
            finder.value(attention)
        if "query-key" in kinds:
            finder.scores(attention)
    used = {layer.weight for part in finder.parts for layer in part.layers}
    for layer in choice:
        if layer.weight in used:
            continue
        reason = finder.reasons.get(layer.weight)
        if reason is not None:
            choice.refuse(layer, reason)
        elif len(kinds) < 3:
            choice.leave(layer, "it is in none of the parts that were asked for")
        else:
            choice.refuse(layer, "no width that could shrink was found beside it")
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    return sorted(finder.parts, key=lambda part: order[part.lead.readers[0]])


class _Finder:
    """Parts found so far, and by weight the reasons against others."""

    def __init__(self, program: Program, choice: Choice, method: Method) -> None:
        self.program, self.method = program, method
        self.allowed = {layer.weight: layer for layer in choice}
        self.parts: list[Part] = []
        self.reasons: dict[str, str] = {}
        self._readers: dict[str, set[fx.Node]] = {}
        for node in program.graph.find_nodes(op="get_attr"):
            self._readers.setdefault(str(node.target), set()).update(node.users)

    def feed_forward(self, block: FeedForward) -> None:
        """Take up a feed-forward block."""
        if block.kind == "experts":
            return
        into = [part for part in (block.gate, block.up) if part is not None]
        names = list(dict.fromkeys([part.weight for part in into]))
        lead = block.down.thin or block.down.weight
        biases = [part.bias for part in into if part.bias]
        calls = {node for node in block.nodes if node.op == "call_function"}
        reason = self._reason([*names, lead], biases, calls)
        if not reason:
            for node in sorted(calls - {block.output}):
                reader = next((user for user in node.users if user not in calls), None)
                if reader is not None:
                    reason = f"{op_name(reader) or reader.name} reads from inside the feed-forward block"
        if not reason and any(linear_weight(self.program, node) is None for node in calls if op_name(node) == "linear"):
            reason = "a weight of the feed-forward block is computed"
        if not reason:
            self.parts.append(FeedForwardPart(block, self._layers([*names, lead]), self.allowed[lead], self.method))
        self._note([*names, lead], reason)

    def value(self, attention: Attention) -> None:
        """Take up the values of an attention and the projection after it."""
        names = [name for name in (_made_by(attention.value), _after(attention)) if name]
        reason = attention.value_reason() or self._changed(attention, ("value",), names)
        if not reason:
            self.parts.append(ValuePart(attention, self._layers(names), self.allowed[names[-1]], self.method))
        self._note(names, reason)

    def scores(self, attention: Attention) -> None:
        """Take up the queries and keys of an attention."""
        names = list(dict.fromkeys(name for name in map(_made_by, (attention.query, attention.key)) if name))
        reason = attention.scores_reason() or self._changed(attention, ("query", "key"), names)
        if not reason:
            self.parts.append(ScorePart(attention, self._layers(names), self.allowed[names[0]], self.method))
        self._note([*names, *self._guessed(attention)], reason)

    def _guessed(self, attention: Attention) -> Iterable[str]:
        """The projections behind queries and keys that could not be followed, so that they are given the reason."""
        for name, branch in (("query", attention.query), ("key", attention.key)):
            if isinstance(branch, str):
                node = attention.given(name)
                while op_name(node) != "linear" and node.op == "call_function" and node.all_input_nodes:
                    node = node.all_input_nodes[0]
                weight = linear_weight(self.program, node) if op_name(node) == "linear" else None
                if weight is not None:
                    yield weight

    def _changed(self, attention: Attention, branches: Sequence[str], names: Sequence[str]) -> str:
        if attention.fused:
            branches = ("query", "key", "value")
        found = [branch for name in branches if isinstance(branch := getattr(attention, name), Branch)]
        readers = {branch.linear for branch in found}
        if isinstance(attention.output, fx.Node):
            readers.add(attention.output)
        return self._reason(names, [branch.bias for branch in found if branch.bias], readers)

    def _reason(self, weights: Sequence[str], biases: Sequence[str], readers: Collection[fx.Node]) -> str:
        """Why these weights cannot be changed together by an edit of `readers` alone."""
        for name in weights:
            if name not in self.allowed:
                return f"{name.removesuffix('.weight')} beside it may not be changed"
        for name in (*weights, *biases):
            if not self._readers.get(name, set()) <= set(readers):
                return f"{name} is read in several places"
        return ""

    def _layers(self, names: Sequence[str]) -> tuple[LinearLayer, ...]:
        return tuple(self.allowed[name] for name in dict.fromkeys(names))

    def _note(self, names: Iterable[str], reason: str) -> None:
        if reason:
            for name in names:
                self.reasons.setdefault(name, reason)


def input_means(program: Program, names: Collection[str], windows: Tensor, padding: Tensor | None) -> dict[str, Tensor]:
    """The mean input of linear weights over the calibration text, float64[in]; names as of `stream_covariances`."""
    sources = {
        name: node.all_input_nodes[0]
        for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        if (name := linear_weight(program, node)) in names and name is not None
    }
    totals: dict[fx.Node, Tensor] = {}
    counts: dict[fx.Node, int] = {}
    for batch in token_batches(program, windows, padding=padding) if sources else ():
        real = real_tokens(batch)

        def visit(node: fx.Node, value: Tensor, real: Tensor | None = real) -> None:
            counted = counted_rows(value, real)
            rows = value.reshape(-1, value.shape[-1])
            rows = (rows if counted is None else rows[counted]).double()
            totals[node] = totals.get(node, torch.zeros(())) + rows.sum(0)
            counts[node] = counts.get(node, 0) + len(rows)

        for _ in run_regions(program, [batch], visit, wanted=set(sources.values())):
            pass
    return {name: totals[node] / max(counts[node], 1) for name, node in sources.items()}


def _made_by(branch: Branch | str) -> str:
    return branch.weight if isinstance(branch, Branch) else ""


def _after(attention: Attention) -> str:
    output = attention.output
    return str(output.args[1].target) if isinstance(output, fx.Node) else ""  # type: ignore[union-attr]
