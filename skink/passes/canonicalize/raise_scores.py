"""Reads what a hand-written attention does to its scores, from the softmax up to the product of queries and keys.

    softmax(mask(cap * tanh(q · k * a / cap)))

Each op on the way is one of: a cast or a reshape, a factor, a soft cap, something added, a condition. What cannot be
read is refused with the node that it stopped at.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from skink.graph.masks import Step
from skink.graph.pattern import NoMatch, is_cast, op_name, through_float_casts
from skink.graph.propagate import expression

# Below this a lower bound on scores only keeps minus infinity out.
_LEAST = -1e30


@dataclass(frozen=True)
class Scores:
    """Scores on their way to the softmax.

    Args:
        product: the call that multiplies queries and keys.
        query: [..., T, D], as the product reads it.
        key: [..., D, S], as the product reads it; [..., S, D] where it is not turned.
        key_turned: which of the two.
        steps: what happens between product and softmax, in order, soft caps left out.
        scale: factor on the product; with a cap, on what comes out of it too.
        softcap: 0 for none.
        heads: (B, H) where a reshape between [B*H, T, S] and [B, H, T, S] says them.
        sinks: the tensor joined to the scores, or None.
        lowered: where each row's largest score was taken from it, or None.
    """

    product: fx.Node
    query: fx.Node
    key: fx.Node
    key_turned: bool = True
    steps: tuple[Step, ...] = ()
    scale: float = 1.0
    softcap: float = 0.0
    heads: tuple[Any, int] | None = None
    sinks: fx.Node | None = None
    lowered: fx.Node | None = None

    @property
    def masked(self) -> bool:
        """Whether something other than a factor has happened."""
        return any(step.kind != "scale" for step in self.steps)

    def scaled(self, factor: float) -> "Scores":
        """Times a number."""
        step = Step("scale", factor)
        if self.softcap:
            # cap * tanh(scale / cap * product): both grow.
            return replace(self, softcap=self.softcap * factor, scale=self.scale * factor, steps=(*self.steps, step))
        return replace(self, scale=self.scale * factor, steps=(*self.steps, step))

    def then(self, step: Step) -> "Scores":
        """One more step."""
        return replace(self, steps=(*self.steps, step))


def read_scores(node: fx.Node) -> Scores | NoMatch:
    """How the scores at `node`, which the softmax reads, come about."""
    reader = _READERS.get(op_name(node))
    if reader is None:
        return NoMatch(f"{op_name(node) or node.op} on the scores' way to the softmax is not understood", node)
    found = reader(node)
    if isinstance(found, Scores) and found.sinks is not None and op_name(node) not in _KEEP_SINKS:
        return NoMatch(f"{op_name(node)} changes scores to which a sink is joined", node)
    return found


def number(value: Any) -> float | None:
    """The number that an argument stands for: itself, or a tensor of one element that is known."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    node = value
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
        return None
    if any(size != 1 for size in map(expression, node.meta["val"].shape)):
        return None
    name = op_name(node)
    if name in ("full", "scalar_tensor"):
        return _stored(number(node.args[-1]), node)
    if is_cast(node):
        return _stored(number(node.args[0]), node)
    if name in ("reshape", "unsqueeze", "squeeze", "expand", "lift_fresh_copy"):
        return number(node.args[0])
    if name == "sqrt":
        below = number(node.args[0])
        return None if below is None or below < 0 else below**0.5
    if node.op == "get_attr" and node.graph.owning_module is not None:
        path, _, leaf = str(node.target).rpartition(".")
        tensor = getattr(node.graph.owning_module.get_submodule(path), leaf)
        if not isinstance(tensor, nn.Parameter) and not tensor.is_meta:
            return float(tensor.reshape(()))
    return None


def _stored(value: float | None, node: fx.Node) -> float | None:
    """The number as the dtype of `node` keeps it."""
    dtype = node.meta["val"].dtype
    if value is None or dtype in (torch.float32, torch.float64):
        return value
    return float(torch.tensor(value, dtype=torch.float64).to(dtype))


def _flat(node: fx.Node) -> bool:
    return bool(node.meta["val"].dim() == 3)


def _one_of(node: fx.Node, *candidates: Any) -> tuple[Scores, Any] | NoMatch:
    """The candidate that the product is in, and the other one."""
    failure = NoMatch("no product of queries and keys is behind these scores", node)
    for index, candidate in enumerate(candidates):
        if isinstance(candidate, fx.Node) and _same_size(candidate, node):
            found = read_scores(candidate)
            if isinstance(found, Scores):
                return found, candidates[1 - index]
            failure = found
    return failure


def _same_size(one: fx.Node, other: fx.Node) -> bool:
    sizes = [list(map(expression, node.meta["val"].shape)) for node in (one, other)]
    return sizes[0] == sizes[1]


def _cast(node: fx.Node) -> Scores | NoMatch:
    if not node.meta["val"].is_floating_point():
        return NoMatch(f"scores are cast to {node.meta['val'].dtype}", node)
    return read_scores(node.args[0])  # type: ignore[arg-type]


def _reshape(node: fx.Node) -> Scores | NoMatch:
    source: Any = node.args[0]
    before, after = (tuple(map(expression, entry.meta["val"].shape)) for entry in (source, node))
    wide, narrow = (before, after) if len(before) > len(after) else (after, before)
    if (len(wide), len(narrow)) != (4, 3) or wide[2:] != narrow[1:] or wide[0] * wide[1] != narrow[0]:
        return NoMatch("scores are reshaped to something other than [B, H, T, S] or [B*H, T, S]", node)
    found = read_scores(source)
    if isinstance(found, NoMatch):
        return found
    shape = (source if len(before) == 4 else node).meta["val"].shape
    return replace(found, heads=(shape[0], int(shape[1])))


def _mul(node: fx.Node) -> Scores | NoMatch:
    first, second = node.args[0], node.args[1]
    for value, factor in ((first, number(second)), (second, number(first))):
        if factor is not None and isinstance(value, fx.Node):
            found = read_scores(value)
            return found if isinstance(found, NoMatch) else found.scaled(factor)
    return NoMatch("scores are multiplied by something that is no number", node)


def _div(node: fx.Node) -> Scores | NoMatch:
    divisor = number(node.args[1])
    if not divisor or node.kwargs:
        return NoMatch("scores are divided by something that is no number", node)
    found = read_scores(node.args[0])  # type: ignore[arg-type]
    return found if isinstance(found, NoMatch) else found.scaled(1.0 / divisor)


def _add(node: fx.Node) -> Scores | NoMatch:
    if node.kwargs.get("alpha", 1) != 1:
        return NoMatch("what is added to the scores is multiplied first", node)
    found = _one_of(node, node.args[0], node.args[1])
    return found if isinstance(found, NoMatch) else found[0].then(Step("add", found[1], flat=_flat(node)))


def _sub(node: fx.Node) -> Scores | NoMatch:
    if node.kwargs.get("alpha", 1) != 1:
        return NoMatch("what is taken from the scores is multiplied first", node)
    scores, other = node.args[:2]
    found = read_scores(scores)  # type: ignore[arg-type]
    if isinstance(found, NoMatch):
        return found
    if not isinstance(other, fx.Node):
        return _unless_sinks(found.then(Step("add", -other)), node)  # type: ignore[operator]
    if _is_largest(through_float_casts(other, node), scores):
        # A softmax is not changed by a constant in each row.
        return replace(found, lowered=node)
    return _unless_sinks(found.scaled(-1.0).then(Step("add", other, flat=_flat(node))).scaled(-1.0), node)


def _unless_sinks(found: Scores, node: fx.Node) -> Scores | NoMatch:
    return NoMatch("sub changes scores to which a sink is joined", node) if found.sinks is not None else found


def _is_largest(node: Any, of: Any) -> bool:
    """Whether `node` is each row's largest entry of `of`."""
    if op_name(node) == "getitem" and node.args[1] == 0:
        node = through_float_casts(node.args[0])
    if op_name(node) not in ("max", "amax") or len(node.args) < 3 or not node.args[2]:
        return False
    axis = node.args[1][0] if isinstance(node.args[1], list | tuple) else node.args[1]
    return through_float_casts(node.args[0]) is through_float_casts(of) and axis in (-1, of.meta["val"].dim() - 1)


def _masked_fill(node: fx.Node) -> Scores | NoMatch:
    scores, condition, value = node.args[:3]
    found = read_scores(scores)  # type: ignore[arg-type]
    return found if isinstance(found, NoMatch) else found.then(Step("fill", condition, value, _flat(node)))


def _where(node: fx.Node) -> Scores | NoMatch:
    condition, first, second = node.args[:3]
    found = _one_of(node, first, second)
    if isinstance(found, NoMatch):
        return found
    scores, other = found
    return scores.then(Step("keep" if other is second else "fill", condition, other, _flat(node)))


def _bounded(node: fx.Node) -> Scores | NoMatch:
    """A lower bound far below every score changes none that counts."""
    low, high = (*node.args[1:], None, None)[:2]
    bound = number(low if low is not None else node.kwargs.get("min"))
    if bound is None or bound > _LEAST or high is not None or node.kwargs.get("max") is not None:
        return NoMatch("scores are bounded", node)
    return read_scores(node.args[0])  # type: ignore[arg-type]


def _tanh(node: fx.Node) -> Scores | NoMatch:
    found = read_scores(node.args[0])  # type: ignore[arg-type]
    if isinstance(found, NoMatch):
        return found
    if found.lowered is not None:
        return NoMatch("each row's largest score is taken from it before the soft cap", found.lowered)
    if found.masked or found.softcap:
        return NoMatch("the soft cap comes after a mask or another cap", node)
    # tanh(a * product) is a cap of one.
    return replace(found, softcap=1.0)


def _cat(node: fx.Node) -> Scores | NoMatch:
    entries: Any = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else 0
    if len(entries) != 2 or axis not in (-1, node.meta["val"].dim() - 1) or entries[1].meta["val"].shape[-1] != 1:
        return NoMatch("more than one more score is joined to each row", node)
    found = read_scores(entries[0])
    if isinstance(found, NoMatch):
        return found
    if found.sinks is not None:
        return NoMatch("more than one more score is joined to each row", node)
    if found.lowered is not None:
        return NoMatch("each row's largest score is taken from it before a sink is joined", found.lowered)
    return replace(found, sinks=entries[1])


def _product(node: fx.Node) -> Scores:
    query, key = node.args[:2]
    return Scores(node, query, key)  # type: ignore[arg-type]


def _einsum(node: fx.Node) -> Scores | NoMatch:
    """Two operands of one letter for each axis, no axis summed but that of features."""
    equation, operands = node.args[:2]
    found = letters(equation)
    if found is None or len(found) != 3 or len(operands) != 2:  # type: ignore[arg-type]
        return NoMatch(f"the product {equation!r} is not understood", node)
    query, key, result = found
    if len(result) not in (3, 4) or query != result[:-1] + query[-1] or key != result[:-2] + result[-1] + query[-1]:
        return NoMatch(f"the product {equation!r} is not one of [..., T, D] and [..., S, D]", node)
    return Scores(node, *operands, key_turned=False)  # type: ignore[misc]


def letters(equation: Any) -> list[str] | None:
    """The letters of the operands and of the result of `bhtd,bhsd->bhts`, none twice in one of them."""
    parts = str(equation).replace(" ", "").replace("->", ",").split(",")
    plain = "->" in str(equation) and all(part.isalpha() and len(set(part)) == len(part) for part in parts)
    return parts if plain else None


def _baddbmm(node: fx.Node) -> Scores | NoMatch:
    bias, query, key = node.args[:3]
    beta, alpha = float(node.kwargs.get("beta", 1)), float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    found = Scores(node, query, key)  # type: ignore[arg-type]
    if not beta:
        return found.scaled(alpha)
    return found.scaled(alpha / beta).then(Step("add", bias, flat=True)).scaled(beta)


# What leaves a sink as it is beside the scores; `sub` sees to it itself.
_KEEP_SINKS = frozenset({"cat", "sub", "to", "type_as", "_to_copy", "alias", "reshape", "view"})

_READERS: dict[str, Callable[[fx.Node], Scores | NoMatch]] = {
    **dict.fromkeys(("to", "type_as", "_to_copy", "alias"), _cast),
    **dict.fromkeys(("reshape", "view"), _reshape),
    **dict.fromkeys(("maximum", "max", "clamp", "clamp_min"), _bounded),
    **dict.fromkeys(("matmul", "bmm"), _product),
    "mul": _mul,
    "div": _div,
    "add": _add,
    "sub": _sub,
    "masked_fill": _masked_fill,
    "where": _where,
    "tanh": _tanh,
    "cat": _cat,
    "einsum": _einsum,
    "baddbmm": _baddbmm,
}
