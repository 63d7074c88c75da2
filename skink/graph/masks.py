"""Which mask a model builds for its attention, found by asking: the mask's part of the graph is run on small inputs.

A model writes its mask in one of a hundred ways. All that matters is what becomes of a score on its way to the
softmax, so the steps on that way are run with every product at zero, for sizes from one token to hundreds and several
paddings, and what comes out is compared with what a causal mask, its window, key padding and ALiBi would give. Another
run, with every product at one, shows that scores are masked and not replaced.

Rows of queries that are padding themselves are not compared: nothing reads what comes of them. Padding within a
sequence is not tried.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from skink.graph.mask_values import Evaluation, UnknownMaskError, Values, numbers_at, read_by, stored_tensor
from skink.graph.pattern import NoMatch
from skink.graph.propagate import expression

# A score below this has no weight beside any other: exp of it is zero. Some models use -10000 for minus infinity.
_MASKED = -9000.0
# Windows up to this size are told from none where a number in the graph says how large they may be; otherwise those up
# to the second.
_LARGEST = 8192
_UNNAMED = 1024
# Lengths at which all heads, inputs and paddings are compared, with how many of the paddings.
_COMPARED = {1: 3, 2: 3, 5: 3, 9: 3, 150: 2, 331: 1}
_SMALL = 9
_FITTED = 33
# How many more keys than queries are tried, where their numbers are two.
_MORE_KEYS = 3


@dataclass(frozen=True)
class MaskKind:
    """What a mask does.

    Args:
        causal: a query sees no key after itself.
        window: a query sees itself and the `window - 1` keys before it; 0 for no window.
        padding: name of the input that says which keys are there, [B, S] and zero for padding; empty for none.
        slopes: ALiBi's, one for each head, or None.
    """

    causal: bool = False
    window: int = 0
    padding: str = ""
    slopes: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Step:
    """One step on a score's way from the product to the softmax.

    Args:
        kind: `scale` multiplies by a number; `add` adds a tensor; `keep` keeps the score where a condition holds and
            puts `value` elsewhere; `fill` is its opposite.
        operand: the number, the tensor, the condition.
        value: for `keep` and `fill`.
        flat: the scores are [B*H, T, S] at this step, not [B, H, T, S].
    """

    kind: Literal["scale", "add", "keep", "fill"]
    operand: Any
    value: Any = 0.0
    flat: bool = False

    def nodes(self) -> list[fx.Node]:
        """The tensors that take part."""
        return [entry for entry in (self.operand, self.value) if isinstance(entry, fx.Node)]


# What was found for each graph's masks, which all layers share. Nothing in here may refer to the graph.
_KNOWN: "WeakKeyDictionary[fx.Graph, dict[Any, MaskKind]]" = WeakKeyDictionary()


def classify(steps: Sequence[Step], shape: Sequence[Any], root: fx.Node) -> MaskKind | NoMatch:
    """What the steps do to scores of `shape`, [B, H, T, S] (numbers or symbolic sizes); or why that is no known mask.

    Args:
        steps: in the order in which they are applied.
        shape: of the scores.
        root: the node to name where no other is to blame.
    """
    nodes = [node for step in steps for node in step.nodes()]
    if not nodes:
        return MaskKind()
    question = _Question(tuple(steps), tuple(map(expression, shape)), nodes[-1])
    known = _KNOWN.setdefault(root.graph, {})
    kind = known.get(question.key)
    if kind is None:
        try:
            kind = question.answer()
        except UnknownMaskError as unknown:
            return unknown.reason
        known[question.key] = kind
    return kind


@dataclass(frozen=True)
class _Question:
    steps: tuple[Step, ...]
    shape: tuple[Any, ...]
    node: fx.Node

    @cached_property
    def part(self) -> dict[fx.Node, int]:
        """The nodes whose values the mask rests on, numbered."""
        found: dict[fx.Node, None] = {}
        pending = [node for step in self.steps for node in step.nodes()]
        while pending:
            node = pending.pop()
            if node in found or not isinstance(node.meta.get("val"), Tensor | tuple | list):
                continue
            found[node] = None
            pending.extend(read_by(node))
        return {node: index for index, node in enumerate(found)}

    @cached_property
    def key(self) -> Any:
        """Equal for masks that are built in the same way from the same inputs and weights."""

        def plain(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return tuple(map(plain, value))
            if isinstance(value, fx.Node):
                size = value.meta.get("val")
                return ("node", self.part[value]) if value in self.part else ("size", str(expression(size)))
            return repr(value)

        steps = tuple((step.kind, plain(step.operand), plain(step.value), step.flat) for step in self.steps)
        nodes = tuple(
            (
                str(node.target),
                id(stored_tensor(node)) if node.op == "get_attr" else 0,
                plain((*node.args, *node.kwargs.items())),
            )
            for node in self.part
        )
        return steps, self.shape, nodes

    @cached_property
    def numbers(self) -> list[int]:
        """Numbers that stand in the mask's part of the graph."""
        return sorted({number for node in self.part for number in numbers_at(node)})

    def answer(self) -> MaskKind:
        for node in self.part:
            if node.op == "get_attr" and isinstance(stored_tensor(node), nn.Parameter):
                raise UnknownMaskError(f"the mask rests on the trained weight {node.target}", node)
        inputs = sorted(node for node in self.part if node.op == "placeholder")
        longest, allowed = self._longest(inputs)
        causal, window = self._pairs(allowed)
        kind = MaskKind(causal, window, slopes=self._slopes(inputs))
        padding = self._padding(inputs)
        if padding is not None:
            kind = MaskKind(causal, window, str(padding.target), kind.slopes)
        # Where the model's own tables end before the longest of these, at their end too.
        for length, turns in {min(longest, max(_COMPARED)): 1, **_COMPARED}.items():
            for turn in range(turns):
                self._compare(kind, inputs, padding, length, turn)
        return kind

    def _pairs(self, allowed: Tensor) -> tuple[bool, int]:
        """(causal, window), from the longest sequence that could show a window."""
        tokens, keys = allowed.shape
        after = torch.arange(keys) - (torch.arange(tokens)[:, None] + keys - tokens)
        if bool(allowed.all()):
            return False, 0
        if torch.equal(allowed, after <= 0):
            return True, 0
        window = int(allowed[-1].sum())
        if torch.equal(allowed, (after <= 0) & (after > -window)):
            return True, window
        if bool(allowed[-1, -1]) and torch.equal(allowed, after > -window):
            return False, window
        raise UnknownMaskError("the mask is none of causal, causal with a window, and all", self.node)

    def _longest(self, inputs: list[fx.Node]) -> tuple[int, Tensor]:
        """(length, which pairs are allowed in the first head) for the longest sequence worth trying."""
        numbers = sorted({_FITTED, _UNNAMED, *self.numbers}, reverse=True)
        if numbers[0] > _LARGEST:
            raise UnknownMaskError(
                f"the mask may have a window of {numbers[0]}, and {_LARGEST} is the most tried", self.node
            )
        # Where the model's own tables end, longer sequences fail.
        lengths = [length for number in numbers for length in (number + 3, number)]
        for length in lengths:
            try:
                bias = self._bias({node: "ones" for node in inputs}, length, batch=1, heads=slice(0, 1))
            except UnknownMaskError:
                if length == lengths[-1]:
                    raise
                continue
            return length, bias[0, 0] > _MASKED
        raise AssertionError("unreachable")

    def _slopes(self, inputs: list[fx.Node]) -> tuple[float, ...] | None:
        """What the scores of the last query gain from key to key, by head."""
        length = _FITTED
        while True:
            try:
                bias = self._bias({node: "ones" for node in inputs}, length)[0, :, -1].double()
                break
            except UnknownMaskError:
                if length == 1:
                    raise
                length //= 2
        seen = (bias[0] > _MASKED).nonzero().flatten()
        if len(seen) < 2:
            return None
        first, last = int(seen[0]), int(seen[-1])
        slopes = (bias[:, last] - bias[:, first]) / (last - first)
        return tuple(map(float, slopes)) if bool((slopes.abs() > 1e-7).any()) else None

    def _padding(self, inputs: list[fx.Node]) -> fx.Node | None:
        """The one input whose values matter."""
        plain = self._bias({node: "ones" for node in inputs}, _SMALL)
        mattering = []
        for node in inputs:
            changed: tuple[Values, ...] = ("padded", "counted", "random")
            for values in changed:
                if not _same(plain, self._bias({**{other: "ones" for other in inputs}, node: values}, _SMALL)):
                    mattering.append(node)
                    break
        if len(mattering) > 1:
            names = " and ".join(str(node.target) for node in mattering)
            raise UnknownMaskError(f"the mask depends on more than one input: {names}", mattering[0])
        for node in mattering:
            dims = tuple(map(expression, node.meta["val"].shape))
            if dims not in ((self.shape[0], self.shape[3]), (1, self.shape[3])):
                raise UnknownMaskError(f"the mask depends on {node.target}, which is no padding mask [B, S]", node)
        return mattering[0] if mattering else None

    def _compare(self, kind: MaskKind, inputs: list[fx.Node], padding: fx.Node | None, length: int, turn: int) -> None:
        given: dict[fx.Node, Values] = dict.fromkeys(inputs, "random")
        if padding is not None:
            given[padding] = "padded"
        try:
            evaluation = self._evaluation(given, length, turn=turn)
            bias, scaled = self._run(evaluation), self._run(evaluation, product=1.0)
        except UnknownMaskError:
            if length > 2:
                return  # longer than the model's own tables
            raise
        batch, heads, tokens, keys = bias.shape
        after = torch.arange(keys) - (torch.arange(tokens)[:, None] + keys - tokens)
        expected = torch.ones(batch, 1, tokens, keys, dtype=torch.bool)
        if kind.causal:
            expected &= after <= 0
        if kind.window:
            expected &= after > -kind.window
        real = torch.ones(batch, 1, tokens, 1, dtype=torch.bool)
        if padding is not None:
            present = evaluation.inputs[padding].bool().expand(batch, -1)
            expected &= present[:, None, None, :]
            real &= present[:, None, -tokens:, None]
        if not torch.equal((bias > _MASKED) & real, (expected & real).expand(-1, heads, -1, -1)):
            raise UnknownMaskError("the mask treats some heads, padding or lengths in a way of its own", self.node)
        kept = (scaled - bias)[(expected & real).expand(-1, heads, -1, -1)]
        if len(kept) and not torch.allclose(kept, kept[:1], rtol=1e-4, atol=1e-4):
            raise UnknownMaskError("some scores are replaced, and not masked", self.node)
        slopes = torch.tensor(kind.slopes or [0.0] * heads).view(-1, 1, 1)
        rest = (bias - slopes * after).masked_fill(~(expected & real), torch.nan).double()
        spread = rest.nan_to_num(-torch.inf).amax(-1) - rest.nan_to_num(torch.inf).amin(-1)
        if bool((spread > 1e-4 * max(1.0, float(slopes.abs().max()) * keys)).any()):
            raise UnknownMaskError("the scores gain a bias that is not ALiBi's", self.node)

    def _evaluation(self, given: dict[fx.Node, Values], length: int, *, batch: int = 3, turn: int = 0) -> Evaluation:
        sizes = {symbol: length for dim in self.shape[1:] for symbol in getattr(dim, "free_symbols", ())}
        queries, keys = (set(getattr(dim, "free_symbols", ())) for dim in self.shape[2:])
        sizes |= {symbol: length + _MORE_KEYS for symbol in keys - queries}
        sizes |= {symbol: batch for symbol in getattr(self.shape[0], "free_symbols", ())}
        return Evaluation(sizes, given, length, turn, self.numbers)

    def _bias(self, given: dict[fx.Node, Values], length: int, *, batch: int = 3, heads: slice = slice(None)) -> Tensor:
        return self._run(self._evaluation(given, length, batch=batch), heads)

    def _run(self, evaluation: Evaluation, heads: slice = slice(None), product: float = 0.0) -> Tensor:
        """What becomes of a product: float32[B, H, T, S]."""
        shape = [evaluation.size(dim) for dim in self.shape]
        score = torch.full((1, 1, 1, 1), product)
        try:
            for step in self.steps:
                score = _applied(step, score, evaluation, shape, heads)
            score = score.float().expand(shape[0], len(range(*heads.indices(shape[1]))), shape[2], shape[3])
        except RuntimeError as error:
            # Tables end where the longest text does.
            raise UnknownMaskError(f"the mask does not fit {shape[2]} tokens: {error}", self.node) from error
        if bool(score.isnan().any()):
            raise UnknownMaskError("the mask makes scores that are not numbers", self.node)
        return score


def _applied(step: Step, score: Tensor, evaluation: Evaluation, shape: Sequence[int], heads: slice) -> Tensor:
    """The scores after one more step, for some of the heads."""

    def operand(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        tensor = evaluation.value(value)
        if step.flat and tensor.dim() == 3 and tensor.shape[0] == shape[0] * shape[1]:
            tensor = tensor.reshape(*shape[:2], *tensor.shape[1:])
        tensor = tensor[(None,) * (4 - tensor.dim())]
        return tensor[:, heads] if tensor.shape[1] == shape[1] else tensor

    if step.kind == "scale":
        score = score * step.operand
        return score
    if step.kind == "add":
        score = score + operand(step.operand)
        return score
    condition = operand(step.operand).bool()
    value = torch.as_tensor(operand(step.value), dtype=torch.float32)
    return torch.where(condition if step.kind == "keep" else ~condition, score, value)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two masks do the same to scores."""
    hidden = (one <= _MASKED) & (other <= _MASKED)
    return bool(torch.isclose(one, other, rtol=1e-5, atol=1e-6).logical_or(hidden).all())
