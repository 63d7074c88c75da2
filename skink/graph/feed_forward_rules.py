"""The patterns of feed-forward blocks: what an activation function looks like, however a model writes it, and where the
products stand around it.

    plain    down(act(up(x)))                 one rule for each activation
    gated    down(act(gate(x)) * up(x))       two products, or one whose outputs are cut in two

A product may be factored into two, the thin one first (FACTORED_RULES).

They describe, and never rewrite. Sources: Vaswani et al. 2017, equation 2; Shazeer 2020 (arXiv 2002.05202), equation 6;
Hendrycks and Gimpel 2016 (arXiv 1606.08415) for GELU and its approximation by tanh.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from skink.graph.pattern import LAST_AXIS, Call, Match, NoMatch, Rule, Weight, any_of, op_name, ops, through_casts
from skink.graph.rewriter import Rewriter

# Some models round the square root of 2/π, and every one its own way.
_ROOT = any_of(math.sqrt(2 / math.pi), 0.7978845608, 0.79788456, 0.797885)


def _half_of(x: Any, factor: Any) -> Any:
    """x / 2 * factor, in any order."""
    return any_of(ops.mul(ops.mul(x, 0.5), factor), ops.mul(ops.mul(factor, 0.5), x), ops.mul(ops.mul(x, factor), 0.5))


def _gelu(x: Any) -> Any:
    scaled = any_of(ops.div(x, math.sqrt(2)), ops.mul(x, math.sqrt(0.5)))
    return any_of(ops.gelu(x), _half_of(x, ops.add(ops.erf(scaled), 1.0)))


def _gelu_tanh(x: Any) -> Any:
    cube = any_of(
        ops.mul(any_of(ops.pow(x, 3.0), ops.mul(ops.mul(x, x), x)), 0.044715),
        ops.mul(ops.mul(ops.mul(x, 0.044715), x), x),
    )
    factored = ops.add(ops.mul(ops.mul(x, 0.044715), x), 1.0)
    inner = any_of(
        ops.mul(ops.add(x, cube), _ROOT),
        ops.mul(ops.mul(x, _ROOT), factored),
        ops.mul(ops.mul(x, factored), _ROOT),
    )
    return any_of(ops.gelu(x, "tanh"), _half_of(x, ops.add(ops.tanh(inner), 1.0)))


def _relu2(x: Any) -> Any:
    positive = ops.relu(x)
    return any_of(ops.pow(positive, 2.0), ops.square(positive), ops.mul(positive, positive))


def _one_op(name: str) -> Callable[[Any], Any]:
    return lambda x: getattr(ops, name)(x)


Activation = Callable[[Any], Any]

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": lambda x: any_of(ops.silu(x), ops.mul(x, ops.sigmoid(x))),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: ops.mul(x, ops.sigmoid(ops.mul(x, 1.702))),
    "relu": _one_op("relu"),
    "relu2": _relu2,
    **{name: _one_op(name) for name in ("sigmoid", "tanh", "relu6", "mish", "elu", "leaky_relu", "hardswish", "selu")},
}


def _product(x: Any, weight: Any, thin: Any) -> Any:
    """A linear layer, or two in a row for one that was factored, the thin one first."""
    return any_of(ops.linear(ops.linear(x, thin, ...), weight, ...), ops.linear(x, weight, ...))


def _last(hidden: Any, weight: Any, thin: Any) -> Call:
    return ops.linear(any_of(ops.linear(hidden, thin, ...), hidden), weight, ...)


def _plain(activation: Activation, product: Any, last: Any) -> Callable[..., Call]:
    def pattern(x: Tensor, up: Weight, up_thin: Weight, down: Weight, down_thin: Weight) -> Call:
        found: Call = last(activation(product(x, up, up_thin)), down, down_thin)
        return found

    return pattern


def _gated(activation: Activation, product: Any, last: Any) -> Callable[..., Call]:
    def pattern(
        x: Tensor, gate: Weight, gate_thin: Weight, up: Weight, up_thin: Weight, down: Weight, down_thin: Weight
    ) -> Call:
        hidden = ops.mul(activation(product(x, gate, gate_thin)), product(x, up, up_thin))
        found: Call = last(hidden, down, down_thin)
        return found

    return pattern


def _fused(activation: Activation, product: Any, last: Any) -> Callable[..., Call]:
    def pattern(
        x: Tensor,
        both: Weight,
        both_thin: Weight,
        gate_part: int,
        up_part: int,
        size: Any,
        down: Weight,
        down_thin: Weight,
    ) -> Call:
        cut = ops.any_of("chunk", "split", "split_with_sizes")(product(x, both, both_thin), size, LAST_AXIS)
        hidden = ops.mul(activation(ops.getitem(cut, gate_part)), ops.getitem(cut, up_part))
        found: Call = last(hidden, down, down_thin)
        return found

    return pattern


def _sliced(activation: Activation, product: Any, last: Any) -> Callable[..., Call]:
    def pattern(
        x: Tensor,
        both: Weight,
        both_thin: Weight,
        gate_start: int,
        gate_end: int,
        up_start: int,
        up_end: int,
        down: Weight,
        down_thin: Weight,
    ) -> Call:
        whole = product(x, both, both_thin)
        gate, up = ops.slice(whole, LAST_AXIS, gate_start, gate_end), ops.slice(whole, LAST_AXIS, up_start, up_end)
        found: Call = last(ops.mul(activation(gate), up), down, down_thin)
        return found

    return pattern


def product_of(found: Match, weight: str) -> fx.Node:
    """The linear layer of a match whose weight has this name among the bindings."""
    wanted = through_casts(found[weight])
    products = (node for node in (*found.nodes, *found.roots) if op_name(node) == "linear")
    return next(node for node in products if through_casts(node.args[1]) is wanted)


def cut_rows(found: Match) -> tuple[tuple[int, int], tuple[int, int]]:
    """Which outputs of a product that is cut in two are the gate, and which the other part."""
    if "gate_part" in found.bindings:
        first = product_of(found, "down_thin" if "down_thin" in found.bindings else "down")
        size = int(first.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]
        gate, up = found["gate_part"] * size, found["up_part"] * size
        return (gate, gate + size), (up, up + size)
    whole = _outputs(found)
    gate, up = found["gate_start"], found["up_start"]
    return (gate, min(found["gate_end"], whole)), (up, min(found["up_end"], whole))


def _outputs(found: Match) -> int:
    return int(through_casts(found["both"]).meta["val"].shape[0])


def _check_whole(found: Match) -> NoMatch | None:
    half = _outputs(found) // 2 if "both" in found.bindings else 0
    if half and sorted(cut_rows(found)) != [(0, half), (half, 2 * half)]:
        return NoMatch("gate and up are not the two halves of one product", product_of(found, "both"))
    return None


def _check_factored(found: Match) -> NoMatch | None:
    thin = [name for name in ("gate_thin", "up_thin", "both_thin", "down_thin") if name in found.bindings]
    for name in thin:
        rank, inputs = through_casts(found[name]).meta["val"].shape
        outputs = through_casts(found[name.removesuffix("_thin")]).meta["val"].shape[0]
        if rank >= min(inputs, outputs):
            return NoMatch("two products in a row, neither of them thin", product_of(found, name))
    return _check_whole(found) if thin else NoMatch("no product is factored", found.root)


def _never(rewriter: Rewriter, found: Match) -> fx.Node:
    raise TypeError("rules of feed-forward blocks describe, they do not rewrite")


def _rules(product: Any, last: Any, check: Callable[[Match], NoMatch | None]) -> Mapping[str, Rule]:
    structures = {"plain": _plain, "gated": _gated, "fused": _fused, "sliced": _sliced}
    return {
        f"{kind}:{name}": Rule(f"{kind}-feed-forward", pattern=make(form, product, last), rewrite=_never, check=check)
        for kind, make in structures.items()
        for name, form in ACTIVATIONS.items()
    }


# By structure and activation: `gated:silu`.
RULES = _rules(
    lambda x, weight, thin: ops.linear(x, weight, ...), lambda x, weight, thin: ops.linear(x, weight, ...), _check_whole
)
FACTORED_RULES = _rules(_product, _last, _check_factored)
