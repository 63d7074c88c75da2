"""Rules that raise `rotary`: half-split and interleaved pairs, whole and partial, in either layout. Exact.

    x * cos + cat(-x₂, x₁) * sin                     half-split: x₁, x₂ are the halves of x
    x * cos + flatten(stack(-x₂, x₁)) * sin          interleaved: x₁, x₂ are its even and odd features
    cat(x₁ * c - x₂ * s, x₂ * c + x₁ * s)            either, with one angle for each pair
    real(complex(x₁, x₂) * (c + i s))                interleaved, with one angle for each pair

The op takes [B, H, T, D]. Where a model turns [B, T, H, D], the transposes around it meet those that it has itself, and
go.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from skink.graph.pattern import LAST_AXIS, AnyOf, Call, Match, NoMatch, Rule, any_of, op_name, ops, through_float_casts
from skink.graph.propagate import expression
from skink.graph.rewriter import Rewriter
from skink.kernels import ROTARY
from skink.passes.canonicalize.raise_norms import wide_enough

aten = torch.ops.aten
_END = torch.iinfo(torch.int64).max


def _halves(x: Any, half: Any) -> tuple[AnyOf, AnyOf]:
    """The first and the second half of the features."""
    chunks, splits = ops.chunk(x, 2, LAST_AXIS), ops.split(x, half, LAST_AXIS)
    first = any_of(ops.slice(x, LAST_AXIS, 0, half), ops.getitem(chunks, 0), ops.getitem(splits, 0))
    second = any_of(ops.slice(x, LAST_AXIS, half, _END), ops.getitem(chunks, 1), ops.getitem(splits, 1))
    return first, second


def _pairs(x: Any) -> tuple[Call, Call]:
    """The even and the odd features."""
    return ops.slice(x, LAST_AXIS, 0, _END, 2), ops.slice(x, LAST_AXIS, 1, _END, 2)


def _paired(x: Any) -> tuple[AnyOf, AnyOf]:
    """The same, or as they lie in an axis of two."""
    axes, last = ops.reshape(x, ...), any_of(-1, 4)
    even, odd = _pairs(x)
    return any_of(even, ops.select(axes, last, 0)), any_of(odd, ops.select(axes, last, 1))


def _joined(first: Any, second: Any, interleaved: bool) -> Any:
    if not interleaved:
        return ops.cat([first, second], LAST_AXIS)
    stacked = ops.stack([first, second], any_of(-1, 4))
    return any_of(ops.flatten(stacked, any_of(-2, 3), ...), ops.reshape(stacked, ...))


def _whole(x: Any, half: Any, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Call:
    first, second = _pairs(x) if interleaved else _halves(x, half)
    return ops.add(ops.mul(x, cos), ops.mul(_joined(ops.neg(second), first, interleaved), sin))


def _by_pairs(x: Any, half: Any, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Any:
    first, second = _paired(x) if interleaved else _halves(x, half)
    one = ops.sub(ops.mul(first, cos), ops.mul(second, sin))
    other = ops.add(ops.mul(second, cos), ops.mul(first, sin))
    return one, other


def _layout(found: Match, width: int) -> tuple[int, str]:
    """(the axis of heads, why there is none)."""
    x = list(map(expression, found["x"].meta["val"].shape))
    if len(x) != 4:
        return 0, f"{len(x)} dims, not four"
    places = []
    for name in ("cos", "sin"):
        table = list(map(expression, found[name].meta["val"].shape))
        wide = [1] * (4 - len(table)) + table
        axes = _head_axes(wide, x) if len(wide) == 4 else []
        if len(wide) != 4 or wide[3] != width or wide[0] not in (1, x[0]) or not axes:
            return 0, f"the {name} table has not the shape [B, T, {width}]"
        places.append(axes)
    common = [axis for axis in places[0] if axis in places[1]]
    return (common[0], "") if common else (0, "cos and sin turn different axes")


def _check(found: Match, *, by_pairs: bool) -> NoMatch | None:
    width = expression(found["x"].meta["val"].shape[-1])
    half = found.get("half")
    if half is not None and (not isinstance(half, int) or width != 2 * half):
        return NoMatch(f"halves of {half} do not make {width}", found.root)
    if not isinstance(width, int) or width % 2:
        return NoMatch(f"a width of {width} has no pairs", found.root)
    root = list(map(expression, found.root.meta["val"].shape))
    if root != list(map(expression, found["x"].meta["val"].shape)):
        return NoMatch("the result has another shape than the input", found.root)
    reason = _layout(found, width // 2 if by_pairs else width)[1]
    return NoMatch(reason, found.root) if reason else None


def _below(value: Any, reader: fx.Node) -> fx.Node:
    """The node below casts that take no digits from what `reader` makes of it."""
    node: fx.Node = through_float_casts(value, reader)
    return node


def _table(rewriter: Rewriter, node: fx.Node, axis: int, x: fx.Node) -> fx.Node:
    """A table as [B or 1, T, R], without the axis of heads."""
    # The op casts the tables to its input's dtype itself.
    node = _below(node, x)
    dims = node.meta["val"].dim()
    if dims < 3:
        return rewriter.call(aten.unsqueeze.default, node, 0)
    if dims == 3:
        # Its first axis is that of heads.
        return node
    if op_name(node) == "unsqueeze" and node.args[1] in (axis, axis - 4):
        return _below(node.args[0], x)
    if op_name(node) == "repeat_interleave" and node.args[2] in (-1, 3):
        wide = _below(node.args[0], x)
        if op_name(wide) == "unsqueeze" and wide.args[1] in (axis, axis - 4):
            return rewriter.call(aten.repeat_interleave.self_int, _below(wide.args[0], x), node.args[1], 2)
    return rewriter.call(aten.squeeze.dim, node, axis)


def _turn(
    rewriter: Rewriter, x: fx.Node, axis: int, cos: fx.Node, sin: fx.Node, interleaved: bool, rule: str
) -> fx.Node:
    """The op on `x`, whose heads are at `axis`."""
    flags = (True,) if interleaved else ()
    if axis == 1:
        return rewriter.call(ROTARY.overload, x, cos, sin, *flags, rule=rule)
    turned = rewriter.call(aten.transpose.int, x, 1, 2)
    return rewriter.call(aten.transpose.int, rewriter.call(ROTARY.overload, turned, cos, sin, *flags, rule=rule), 1, 2)


def _raise(rewriter: Rewriter, found: Match, *, interleaved: bool) -> fx.Node:
    axis, _ = _layout(found, found["x"].meta["val"].shape[-1])
    x = wide_enough(rewriter, found)
    cos, sin = (_table(rewriter, found[name], axis, x) for name in ("cos", "sin"))
    return _turn(rewriter, x, axis, cos, sin, interleaved, "raise-rotary")


def _raise_by_pairs(rewriter: Rewriter, found: Match, *, interleaved: bool) -> fx.Node:
    axis, _ = _layout(found, found["x"].meta["val"].shape[-1] // 2)
    x = wide_enough(rewriter, found)
    cos, sin = (_doubled(rewriter, _table(rewriter, found[name], axis, x), interleaved) for name in ("cos", "sin"))
    return _turn(rewriter, x, axis, cos, sin, interleaved, "raise-rotary-pairs")


def _doubled(rewriter: Rewriter, table: fx.Node, interleaved: bool) -> fx.Node:
    """One angle for each feature, from one for each pair."""
    if interleaved:
        return rewriter.call(aten.repeat_interleave.self_int, table, 2, 2)
    return rewriter.call(aten.cat.default, [table, table], -1)


def _complex(x: Any, turn: Tensor) -> Call:
    product = ops.mul(ops.view_as_complex(ops.reshape(x, ...)), turn)
    return ops.any_of("reshape", "flatten")(ops.view_as_real(product), ...)


def _check_complex(found: Match) -> NoMatch | None:
    shapes = [list(map(expression, node.meta["val"].shape)) for node in (found["x"], found.root, found["turn"])]
    x, root, turn = shapes
    if len(x) != 4 or x != root:
        return NoMatch("the result has another shape than the input", found.root)
    wide = [1] * (4 - len(turn)) + turn
    if len(wide) != 4 or wide[0] not in (1, x[0]) or 2 * wide[3] != x[3] or not _head_axes(wide, x):
        return NoMatch(f"the factors have not the shape [B, T, {x[3] // 2}]", found.root)
    return None


def _head_axes(table: list[Any], x: list[Any]) -> list[int]:
    """The axes of `x` that could be that of heads: a table is the same along it, and not along the other."""
    return [axis for axis in (1, 2) if table[axis] == 1 and table[3 - axis] == x[3 - axis]]


def _raise_complex(rewriter: Rewriter, found: Match) -> fx.Node:
    sizes = list(map(expression, found["turn"].meta["val"].shape))
    x = list(map(expression, found["x"].meta["val"].shape))
    axis = _head_axes([1] * (4 - len(sizes)) + sizes, x)[0]
    turn = _table(rewriter, found["turn"], axis, found["x"])
    cos, sin = (_doubled(rewriter, part, interleaved=True) for part in _real_parts(rewriter, turn))
    return _turn(rewriter, wide_enough(rewriter, found), axis, cos, sin, True, "raise-rotary-complex")


def _real_parts(rewriter: Rewriter, turn: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Cosine and sine; no complex number is made where a model makes its own from angles."""
    length: Any = turn.args[0] if turn.op == "call_function" else None
    if op_name(turn) == "polar" and op_name(length) in ("ones_like", "ones"):
        angle = turn.args[1]
        return rewriter.call(aten.cos.default, angle), rewriter.call(aten.sin.default, angle)
    pair = rewriter.call(aten.view_as_real.default, turn)
    return rewriter.call(aten.select.int, pair, -1, 0), rewriter.call(aten.select.int, pair, -1, 1)


def _rotary(x: Any, cos: Any, sin: Any) -> Call:
    return Call(("skink.rotary",), (x, cos, sin, ...))


def _parts(x: Any, split: Any, end: Any) -> tuple[AnyOf, AnyOf]:
    """The first `split` features and the rest."""
    splits = ops.any_of("split_with_sizes", "split")(x, [split, end], LAST_AXIS)
    return (
        any_of(ops.slice(x, LAST_AXIS, 0, split), ops.getitem(splits, 0)),
        any_of(ops.slice(x, LAST_AXIS, split, _END), ops.getitem(splits, 1)),
    )


def _partial(x: Any, split: Any, end: Any, cos: Any, sin: Any) -> Call:
    first, rest = _parts(x, split, end)
    return ops.cat([_rotary(first, cos, sin), rest], LAST_AXIS)


def _partial_transposed(x: Any, split: Any, end: Any, cos: Any, sin: Any) -> Call:
    first, rest = _parts(x, split, end)
    return ops.cat([ops.transpose(_rotary(ops.transpose(first, 1, 2), cos, sin), 1, 2), rest], LAST_AXIS)


def _check_partial(found: Match) -> NoMatch | None:
    width = found["cos"].meta["val"].shape[-1]
    return None if found["split"] == width else NoMatch(f"split at {found['split']}, tables of {width}", found.root)


def _raise_partial(rewriter: Rewriter, found: Match, *, axis: int) -> fx.Node:
    inner = next(node for node in found.nodes if node.target is ROTARY.overload)
    interleaved = bool(ROTARY.bind(inner.args, inner.kwargs)["interleaved"])
    return _turn(rewriter, found["x"], axis, found["cos"], found["sin"], interleaved, "raise-rotary-partial")


def _rules(name: str, interleaved: bool) -> list[Rule]:
    def joined(x: Any, half: Any, cos: Tensor, sin: Tensor) -> Any:
        one, other = _by_pairs(x, half, cos, sin, interleaved=interleaved)
        return ops.cat([one, other], LAST_AXIS)

    def flattened(x: Any, cos: Tensor, sin: Tensor) -> Any:
        one, other = _by_pairs(x, None, cos, sin, interleaved=True)
        return ops.any_of("flatten", "reshape")(ops.stack([one, other], any_of(-1, 4)), ...)

    def whole(x: Any, half: Any, cos: Tensor, sin: Tensor) -> Any:
        return _whole(x, half, cos, sin, interleaved=interleaved)

    return [
        Rule(name, whole, partial(_raise, interleaved=interleaved), partial(_check, by_pairs=False)),
        Rule(
            f"{name}-pairs",
            flattened if interleaved else joined,
            partial(_raise_by_pairs, interleaved=interleaved),
            partial(_check, by_pairs=True),
        ),
    ]


RULES: tuple[Rule, ...] = (
    *_rules("raise-rotary", False),
    *_rules("raise-rotary-interleaved", True),
    Rule("raise-rotary-complex", _complex, _raise_complex, _check_complex),
    Rule("raise-rotary-partial", _partial, partial(_raise_partial, axis=1), _check_partial),
    Rule("raise-rotary-partial-transposed", _partial_transposed, partial(_raise_partial, axis=2), _check_partial),
)
