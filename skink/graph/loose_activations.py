"""Activation functions that are in no feed-forward block, and why."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from torch import fx

from skink.graph.blocks import SHAPING, FeedForward
from skink.graph.feed_forward_rules import RULES
from skink.graph.matcher import explain
from skink.graph.pattern import CASTS, Match, NoMatch, op_name
from skink.graph.program import Program

_ACTIVATIONS = frozenset(
    {
        *("silu", "gelu", "relu", "relu6", "sigmoid", "tanh", "mish", "elu", "selu", "celu", "leaky_relu", "hardswish"),
        *("hardtanh", "hardsigmoid", "softplus", "softsign", "erf", "glu", "prelu", "log_sigmoid", "threshold"),
    }
)
# Work on single numbers, and moving them about.
_ELEMENTWISE = frozenset(
    {
        *SHAPING,
        *_ACTIVATIONS,
        *("mul", "add", "sub", "rsub", "div", "pow", "square", "sqrt", "abs", "neg", "exp", "expm1", "log", "log1p"),
        *("clamp", "clamp_min", "clamp_max", "minimum", "maximum", "where"),
        *("getitem", "chunk", "split", "split_with_sizes", "slice", "cat"),
    }
)
# How many calls after an activation the product that reads it is looked for.
_REACH = 10


def loose_activations(program: Program, blocks: Iterable[FeedForward]) -> list[NoMatch]:
    """Every activation function that is in none of the program's blocks, with the reason why it is not."""
    known = {node for block in blocks for part in (block, *block.shared) for node in part.nodes}
    return [_why(node) for node in program.graph.nodes if op_name(node) in _ACTIVATIONS and node not in known]


def _why(node: fx.Node) -> NoMatch:
    """Why an activation is in no block: the best partial match among the products that read it."""
    products, others = _readers(node)
    if not products:
        reader = f", but {op_name(others[0])}" if others else ""
        return NoMatch(f"no linear layer reads it{reader}", node)
    best: NoMatch | None = None
    for product in products:
        for rule in RULES.values():
            found = explain(rule, product)
            if isinstance(found, Match):
                refused = rule.check(found)
                if refused is None:
                    return NoMatch("it stands beside the block that reads it", node)
                return replace(refused, node=node)
            if best is None or found.progress > best.progress:
                best = found
    if best is None:
        raise TypeError("there are no rules for feed-forward blocks")
    return NoMatch(best.reason if best.node is node else f"{best.reason}, at %{best.node.name}", node, best.progress)


def _readers(node: fx.Node) -> tuple[Sequence[fx.Node], Sequence[fx.Node]]:
    """The first linear layers downstream, beyond work on single numbers alone, and other calls that bar the way."""
    found: dict[fx.Node, None] = {}
    others: dict[fx.Node, None] = {}
    frontier: Collection[fx.Node] = [node]
    for _ in range(_REACH):
        following: dict[fx.Node, None] = {}
        for current in frontier:
            for user in current.users:
                if op_name(user) == "linear":
                    found[user] = None
                elif op_name(user) in _ELEMENTWISE or user.target in CASTS:
                    following[user] = None
                elif user.op == "call_function":
                    others[user] = None
        if found:
            break
        frontier = following
    return list(found), list(others)
