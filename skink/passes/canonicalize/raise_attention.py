"""Rules that raise `attention`: from PyTorch's `scaled_dot_product_attention`, and from softmax(q · k) · v by hand.

Exact up to rounding: the op takes its softmax in float32 whatever dtype the model takes it in. Rows of queries that are
padding, which nothing reads, may come out otherwise (see skink/graph/masks.py).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from skink.graph.mask_values import Evaluation, UnknownMaskError
from skink.graph.masks import MaskKind, Step, classify
from skink.graph.pattern import (
    LAST_AXIS,
    AnyOf,
    Call,
    Match,
    NoMatch,
    Rule,
    any_of,
    op_name,
    ops,
    through_float_casts,
)
from skink.graph.propagate import expression
from skink.graph.rewriter import Rewriter
from skink.kernels import ATTENTION
from skink.passes.canonicalize.arguments import arguments_of
from skink.passes.canonicalize.raise_operands import Operand, operand_of, unrepeated, without_factors
from skink.passes.canonicalize.raise_scores import Scores, letters, read_scores

aten = torch.ops.aten

# A score below this has no weight beside any other.
_MASKED = -9000.0
_TOKENS = 7


@dataclass(frozen=True)
class _Attention:
    """An attention that was read: the op's arguments."""

    query: Operand
    key: Operand
    value: Operand
    mask: MaskKind
    scale: float
    softcap: float = 0.0
    sinks: fx.Node | None = None


def _common(
    root: fx.Node, query: Operand, key: Operand, value: Operand, steps: tuple[Step, ...]
) -> tuple[Operand, Operand, MaskKind] | NoMatch:
    """(key, value, mask) where shapes and mask are such as the op has."""
    batch, heads, tokens, width = query.shape
    if not isinstance(heads, int):
        heads = int(heads) if heads.is_integer else 0
    if not heads:
        return NoMatch("the number of heads is not known", root)
    if key.shape[0] != batch or value.shape[0] != batch or key.shape[1] not in (1, heads):
        return NoMatch("batches or heads are broadcast", root)
    if key.shape[3] != width or key.shape[2] != value.shape[2]:
        return NoMatch("queries, keys and values do not fit together", root)
    bare = unrepeated(key), unrepeated(value)
    if bare[0].shape[1] == bare[1].shape[1]:
        key, value = bare
    if key.shape[1] != value.shape[1]:
        return NoMatch("batches or heads are broadcast", root)
    kind = classify(steps, (batch, heads, tokens, key.shape[2]), root)
    if isinstance(kind, NoMatch):
        return kind
    return key, value, kind


def _read_by_hand(found: Match) -> _Attention | NoMatch:
    scores = read_scores(found["scores"])
    if isinstance(scores, NoMatch):
        return scores
    if (scores.sinks is not None) != ("end" in found.bindings):
        return NoMatch("the weights are not cut to the keys, or cut without a sink", found.root)
    if not _pairs_stay(found):
        return NoMatch("the weights are reshaped to something other than [B, H, T, S] or [B*H, T, S]", found.root)
    dims = {node.meta["val"].dim() for node in (scores.query, scores.key, found["value"])}
    if not dims <= {3, 4}:
        return NoMatch(f"products of {max(dims)} dims, not [B, H, T, D]", scores.product)
    bare = _unfolded(scores, found["value"])
    if isinstance(bare, NoMatch):
        return bare
    query, key, value, factor = bare
    common = _common(found.root, query, key, value, scores.steps)
    if isinstance(common, NoMatch):
        return common
    sinks = None
    if scores.sinks is not None:
        moved = _moved(scores, query.shape, common[0].shape[2], common[2].slopes)
        if moved is not None:
            return moved
        sinks = _vector(scores.sinks, query.shape[1])
        if sinks is None:
            return NoMatch("the sinks are not one number for each head", scores.sinks)
    if scores.softcap < 0:
        return NoMatch("the soft cap is negative", scores.product)
    return _Attention(query, *common, scores.scale * factor, scores.softcap, sinks)


def _pairs_stay(found: Match) -> bool:
    """Whether reshapes between the softmax and the second product keep queries and keys as they are."""
    shapes = {
        tuple(map(expression, node.meta["val"].shape[-2:]))
        for node in found.nodes
        if op_name(node) in ("reshape", "flatten")
        or (op_name(node) in ("softmax", "_softmax") and "end" not in found.bindings)
    }
    return len(shapes) <= 1


def _unfolded(scores: Scores, value: fx.Node) -> tuple[Operand, Operand, Operand, float] | NoMatch:
    """Queries, keys and values as [B, H, T, D], and the factor that was on queries and keys."""
    query = scores.query
    heads = scores.heads[1] if scores.heads is not None else 0
    if not heads and query.meta["val"].dim() == 3:
        source = without_factors(query, turned=False, heads=0)[0]
        batch = expression(query.meta["val"].shape[0])
        if source.node.meta["val"].dim() == 4:
            heads = int(source.shape[1])
        elif isinstance(batch, int) or batch.is_Symbol:
            heads = 1
        else:
            return NoMatch("heads are folded into the batch, and their number is not known", scores.product)
    queries, one = without_factors(query, turned=False, heads=heads)
    keys, other = without_factors(scores.key, turned=scores.key_turned, heads=heads)
    return queries, keys, operand_of(value, turned=False, heads=heads), one * other


def _moved(scores: Scores, shape: tuple[Any, ...], keys: Any, slopes: tuple[float, ...] | None) -> NoMatch | None:
    """Why scores do not stay where the op leaves them beside a sink, for which a constant in each row counts.

    Only masks and ALiBi may be added, and ALiBi as the op writes it.
    """
    sizes = {symbol: _TOKENS for dim in (*shape, keys) for symbol in getattr(dim, "free_symbols", ())}
    added = torch.zeros(1, 1, 1, 1)
    for step in scores.steps:
        if step.kind == "scale":
            added = added * step.operand
        elif step.kind == "add":
            value = step.operand
            if isinstance(value, fx.Node):
                given = dict.fromkeys(value.graph.find_nodes(op="placeholder"), "ones")
                try:
                    value = Evaluation(sizes, given, _TOKENS, 0).value(value)  # type: ignore[arg-type]
                except UnknownMaskError as unknown:
                    return unknown.reason
                if step.flat and value.dim() == 3:
                    value = value.unflatten(0, (-1, shape[1])) if value.shape[0] % shape[1] == 0 else value[None]
            added = added + value
    sized = Evaluation(sizes, {}, _TOKENS, 0)
    tokens, present = sized.size(shape[2]), sized.size(keys)
    distance = torch.arange(present) - (torch.arange(tokens)[:, None] + present - tokens)
    expected = torch.tensor(slopes or [0.0]).view(-1, 1, 1) * distance
    if bool(((added - expected).abs().gt(1e-4) & (added > _MASKED)).any()):
        return NoMatch("something is added to the scores before a sink is joined", scores.product)
    return None


def _vector(node: Any, heads: int) -> fx.Node | None:
    """The [H] tensor below what repeats it to [B, H, T, 1]."""
    above = node
    shape = list(map(expression, node.meta["val"].shape))
    if len(shape) != 4 or shape[1] != heads:
        return None
    while node.meta["val"].dim() > 1:
        if op_name(node) not in (
            "expand",
            "reshape",
            "unsqueeze",
            "repeat",
            "broadcast_to",
        ):
            below_casts = through_float_casts(node, above)
            if below_casts is node:
                return None
            node = below_casts
            continue
        sizes = [size for size in map(expression, node.meta["val"].shape) if size != 1]
        below = [size for size in map(expression, node.args[0].meta["val"].shape) if size != 1]
        if op_name(node) == "reshape" and sizes != below:
            return None
        node = node.args[0]
    node = through_float_casts(node, above)
    return node if tuple(map(expression, node.meta["val"].shape)) == (heads,) else None


def _check_by_hand(found: Match) -> NoMatch | None:
    attention = _read_by_hand(found)
    return attention if isinstance(attention, NoMatch) else None


def _raise_by_hand(rewriter: Rewriter, found: Match) -> fx.Node:
    result = _build(rewriter, _certain(_read_by_hand(found)))
    return rewriter.call(aten.flatten.using_ints, result, 0, 1) if found.root.meta["val"].dim() == 3 else result


def _certain(attention: _Attention | NoMatch) -> _Attention:
    if isinstance(attention, NoMatch):
        raise TypeError(f"a match that its check refuses is not rewritten: {attention.reason}")
    return attention


def _build(rewriter: Rewriter, attention: _Attention) -> fx.Node:
    """The op, in the dtype of its values."""
    value = attention.value.build(rewriter)
    query, key = (_like(rewriter, operand.build(rewriter), value) for operand in (attention.query, attention.key))
    mask = attention.mask
    options: dict[str, Any] = {"causal": mask.causal, "scale": attention.scale}
    if mask.window:
        options["window"] = mask.window
    if attention.softcap:
        options["softcap"] = attention.softcap
    if attention.sinks is not None:
        options["sinks"] = attention.sinks
    if mask.slopes is not None:
        options["alibi"] = _slopes(rewriter, mask.slopes)
    padding: tuple[fx.Node, ...] = ()
    if mask.padding:
        entry = next(
            node for node in rewriter.program.graph.find_nodes(op="placeholder") if node.target == mask.padding
        )
        padding = (
            (entry,) if entry.meta["val"].dtype is torch.bool else (rewriter.call(aten.to.dtype, entry, torch.bool),)
        )
    return rewriter.call(ATTENTION.overload, query, key, value, *padding, rule="raise-attention", **options)


def _like(rewriter: Rewriter, node: fx.Node, value: fx.Node) -> fx.Node:
    """Queries and keys may be wider than values, by rotary tables in float32; the op takes them all alike.

    In a program for any dtype only running it in another one would show that, so the cast is always there, and is
    dropped by `drop_casts` where it never does anything.
    """
    if rewriter.program.any_dtype or node.meta["val"].dtype != value.meta["val"].dtype:
        return rewriter.call(aten.type_as.default, node, value)
    return node


def _slopes(rewriter: Rewriter, slopes: tuple[float, ...]) -> fx.Node:
    """The slopes as a stored tensor, one for all layers that have them in common."""
    tensor, index = torch.tensor(slopes, dtype=torch.float32), 0
    stored = set(rewriter.program.stored_weights())
    while (name := f"alibi_slopes_{index}" if index else "alibi_slopes") in stored:
        known = rewriter.program.weight(name)
        if not known.is_meta and torch.equal(known.cpu(), tensor):
            return rewriter.weight(name)
        index += 1
    return rewriter.weight(name, tensor, buffer=True)


def _read_sdpa(found: Match) -> _Attention | NoMatch:
    arguments = arguments_of(found.root)
    query, key, value, mask = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
    if arguments["dropout_p"]:
        return NoMatch(f"dropout {arguments['dropout_p']} is on", found.root)
    shapes = [tuple(map(expression, node.meta["val"].shape)) for node in (query, key, value)]
    if len(shapes[0]) != 4:
        return NoMatch(f"{len(shapes[0])} dims, not [B, H, T, D]", found.root)
    if arguments["is_causal"] and shapes[0][2] != shapes[1][2]:
        # PyTorch lets the first query see the first key alone; the op lets the last query see the last key.
        return NoMatch("causal with more keys than queries, which PyTorch aligns at the first", found.root)
    operands = tuple(Operand(node) for node in (query, key, value))
    if not shapes[0][0] == shapes[1][0] == shapes[2][0] or shapes[1][1] != shapes[2][1] or shapes[0][1] % shapes[1][1]:
        return NoMatch("batches or heads are broadcast", found.root)
    key, value = (unrepeated(operand) for operand in operands[1:])
    if key.shape[1] != value.shape[1]:
        key, value = operands[1:]
    kind: MaskKind | NoMatch = MaskKind(causal=bool(arguments["is_causal"]))
    if mask is not None:
        bool_mask = mask.meta["val"].dtype is torch.bool
        step = Step("keep", mask, -torch.inf) if bool_mask else Step("add", mask)
        kind = classify((step,), (*shapes[0][:3], shapes[1][2]), found.root)
    if isinstance(kind, NoMatch):
        return kind
    scale = arguments["scale"] if arguments["scale"] is not None else 1.0 / math.sqrt(shapes[0][3])
    return _Attention(operands[0], key, value, kind, float(scale))


def _check_sdpa(found: Match) -> NoMatch | None:
    attention = _read_sdpa(found)
    return attention if isinstance(attention, NoMatch) else None


def _raise_sdpa(rewriter: Rewriter, found: Match) -> fx.Node:
    return _build(rewriter, _certain(_read_sdpa(found)))


def _weights(scores: Any, end: Any) -> AnyOf:
    weights = ops.any_of("softmax", "_softmax")(scores, LAST_AXIS, ...)
    cut = ops.slice(weights, LAST_AXIS, 0, end)
    folded = ops.any_of("reshape", "flatten")
    return any_of(weights, folded(weights, ...), folded(folded(weights, ...), ...), cut, folded(cut, ...))


def _by_hand(scores: Tensor, value: Tensor, end: Any) -> Call:
    return ops.any_of("matmul", "bmm")(_weights(scores, end), value)


def _by_einsum(equation: str, scores: Tensor, value: Tensor, end: Any) -> Call:
    return ops.einsum(equation, [_weights(scores, end), value], ...)


def _check_einsum(found: Match) -> NoMatch | None:
    parts = letters(found["equation"])
    if parts is None or len(parts) != 3 or parts[2] != parts[0][:-1] + parts[1][-1] or len(parts[0]) not in (3, 4):
        return NoMatch(f"the product {found['equation']!r} is not understood", found.root)
    weights, value, _ = parts
    if value != weights[:-2] + weights[-1] + value[-1]:
        return NoMatch(f"the product {found['equation']!r} is not one of [..., T, S] and [..., S, D]", found.root)
    return _check_by_hand(found)


RULES: tuple[Rule, ...] = (
    Rule(
        "raise-attention",
        pattern=lambda query, key, value: ops.scaled_dot_product_attention(query, key, value, ...),
        check=_check_sdpa,
        rewrite=_raise_sdpa,
    ),
    Rule("raise-attention-by-hand", pattern=_by_hand, check=_check_by_hand, rewrite=_raise_by_hand),
    Rule("raise-attention-by-einsum", pattern=_by_einsum, check=_check_einsum, rewrite=_raise_by_hand),
)
