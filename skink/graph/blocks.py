"""Feed-forward blocks of a canonical program, plain, gated or mixtures of experts: the regions that passes work on.

Blocks are found by the patterns of feed_forward_rules.py and nothing is rewritten: products stay visible, so that a
pass can take one weight, and the list says which weights make up a block, and where the block begins and ends.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from skink.graph.feed_forward_rules import FACTORED_RULES, RULES, cut_rows, product_of
from skink.graph.matcher import find
from skink.graph.pattern import CASTS, Match, op_name, through_casts
from skink.graph.program import Program
from skink.kernels import EXPERTS

# Moves numbers about and keeps each token's together.
SHAPING = frozenset({"reshape", "view", "flatten", "unsqueeze", "squeeze", "contiguous", "clone", "_unsafe_view"})


@dataclass(frozen=True)
class Projection:
    """One product of a block.

    Args:
        weight: name of the weight, [out, in]; of all experts' stacked, where there are several.
        thin: where the product is factored, name of the factor that comes first, [R, in]; the weight is then [out, R].
        bias: name of the bias, empty where there is none.
        rows: which outputs of the weight are this projection, (0, out) where all are.
        step: of the rows; 2 where gate and up alternate.
    """

    weight: str
    bias: str
    rows: tuple[int, int]
    step: int = 1
    thin: str = ""


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward block.

    Args:
        kind: `plain`, down(act(up(x))); `gated`, down(act(gate(x)) * up(x)); `experts`, several of either, of which a
            router chooses some for each token.
        activation: the function, however the model writes it: silu, gelu, gelu_tanh, relu, relu2, quick_gelu, ... What
            else experts do between their products (limits, a shift) is in the op's arguments.
        width: inner width F, of one expert where there are several.
        module: what the names of its weights have in common.
        input: the node that the block reads, [..., E]; of experts, before batch and time are joined.
        output: the node that it ends in, [..., E]; of experts, after batch and time are parted again.
        up, down, gate: its products; there is no gate in a plain block, nor where experts have none.
        nodes: the calls that belong to it, the router's with them.
        experts: how many there are; 0 for a block that is no mixture.
        chosen: how many of them each token uses.
        router: the product that scores the experts, where it was found.
        shared: the blocks beside the experts that every token uses; these stand in no other place of the list.
    """

    kind: Literal["plain", "gated", "experts"]
    activation: str
    width: int
    module: str
    input: fx.Node
    output: fx.Node
    up: Projection
    down: Projection
    gate: Projection | None
    nodes: frozenset[fx.Node]
    experts: int = 0
    chosen: int = 0
    router: fx.Node | None = None
    shared: tuple["FeedForward", ...] = ()


def feed_forward_blocks(program: Program) -> list[FeedForward]:
    """The feed-forward blocks of a canonical program, in the graph's order."""
    dense: list[FeedForward] = []
    mixtures: list[FeedForward] = []
    for node in program.graph.nodes:
        if op_name(node) == "linear":
            block = _dense(node)
            dense += [block] if block is not None else []
        elif node.target is EXPERTS.overload:
            block = _mixture(node)
            mixtures += [block] if block is not None else []
    # The thin factor of a last product looks like a last product itself.
    dense = [block for block in dense if not any(block.output in other.nodes for other in dense if other is not block)]
    for index, mixture in enumerate(mixtures):
        source = _below_shaping(mixture.input)
        shared = tuple(block for block in dense if _below_shaping(block.input) is source)
        mixtures[index] = replace(mixture, shared=shared)
        dense = [block for block in dense if block not in shared]
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    return sorted([*dense, *mixtures], key=lambda block: order[block.output])


def _dense(node: fx.Node) -> FeedForward | None:
    """The plain or gated block that ends in a linear layer."""
    for rules in (FACTORED_RULES, RULES):
        for name, rule in rules.items():
            found = find(rule, node)
            if found is not None and rule.check(found) is None:
                structure, _, activation = name.partition(":")
                return _described(structure, activation, found)
    return None


def _described(structure: str, activation: str, found: Match) -> FeedForward:
    gate: Projection | None
    if "both" in found.bindings:
        gate, up = (_projection(found, "both", rows) for rows in cut_rows(found))
    else:
        up = _projection(found, "up")
        gate = _projection(found, "gate") if "gate" in found.bindings else None
    down = _projection(found, "down")
    products = [projection for projection in (gate, up, down) if projection is not None]
    return FeedForward(
        kind="plain" if structure == "plain" else "gated",
        activation=activation,
        width=up.rows[1] - up.rows[0],
        module=_common(name for part in products for name in (part.weight, part.bias, part.thin) if name),
        input=found["x"],
        output=found.root,
        up=up,
        down=down,
        gate=gate,
        nodes=frozenset({*found.nodes, *found.roots}),
    )


def _projection(found: Match, weight: str, rows: tuple[int, int] | None = None) -> Projection:
    node = product_of(found, weight)
    name, bias = _weight_name(node.args[1]), _weight_name(node.args[2] if len(node.args) > 2 else None)
    whole = int(through_casts(node.args[1]).meta["val"].shape[0])
    return Projection(name, bias, rows or (0, whole), thin=_weight_name(found.get(f"{weight}_thin")))


def _weight_name(argument: Any) -> str:
    below = through_casts(argument)
    return str(below.target) if isinstance(below, fx.Node) and below.op == "get_attr" else ""


def _mixture(node: fx.Node) -> FeedForward | None:
    """The block of experts that a call of the op is; None where its weights are computed."""
    given = EXPERTS.bind(node.args, node.kwargs)
    names = {name: _weight_name(given[name]) for name in ("up", "down", "up_bias", "down_bias")}
    if not names["up"] or not names["down"]:
        return None
    stacked, width = given["up"].meta["val"].shape, int(given["tokens"].meta["val"].shape[-1])
    inner = int(stacked[2] if given["transposed"] else stacked[1])
    gate_rows, up_rows, step = None, (0, inner), 1
    if given["gated"]:
        gate_rows, up_rows = ((0, inner // 2), (inner // 2, inner))
        if given["interleaved"]:
            gate_rows, up_rows, step = (0, inner), (1, inner), 2
    router, routing = _router(node, number=int(stacked[0]))
    begin, end = _below_shaping(given["tokens"]), _above_shaping(node)
    activation = str(given["activation"])
    if given["alpha"] != 1.0:
        activation = "quick_gelu" if given["alpha"] == 1.702 else f"{activation}({given['alpha']:g})"
    return FeedForward(
        kind="experts",
        activation=activation,
        width=inner // 2 if given["gated"] else inner,
        module=_common(name for name in names.values() if name),
        input=begin,
        output=end,
        up=Projection(names["up"], names["up_bias"], up_rows, step),
        down=Projection(names["down"], names["down_bias"], (0, width)),
        gate=Projection(names["up"], names["up_bias"], gate_rows, step) if gate_rows is not None else None,
        nodes=frozenset({node, *routing}),
        experts=int(stacked[0]),
        chosen=int(given["chosen"].meta["val"].shape[-1]),
        router=router,
    )


def _router(node: fx.Node, *, number: int) -> tuple[fx.Node | None, set[fx.Node]]:
    """The product that scores the experts, and all calls between it and the op."""
    given = EXPERTS.bind(node.args, node.kwargs)
    source = _below_shaping(given["tokens"])
    seen: set[fx.Node] = set()
    pending = deque([given["chosen"], given["shares"]])
    router: fx.Node | None = None
    while pending:
        current = pending.popleft()
        if current in seen or current.op != "call_function" or current is source:
            continue
        seen.add(current)
        value = current.meta.get("val")
        scores = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[-1] == number
        if scores and op_name(current) in ("linear", "mm", "matmul", "addmm"):
            router = router or current
            continue
        pending.extend(current.all_input_nodes)
    return (router, seen) if router is not None else (None, set())


def _below_shaping(node: fx.Node) -> fx.Node:
    while op_name(node) in SHAPING or (node.op == "call_function" and node.target in CASTS):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _above_shaping(node: fx.Node) -> fx.Node:
    """The last of the calls that only give `node` another shape."""
    while len(node.users) == 1 and op_name(user := next(iter(node.users))) in SHAPING:
        node = user
    return node


def _common(names: Iterable[str]) -> str:
    """The longest run of leading parts that the names share, less the leaf."""
    parts = [name.split(".")[:-1] for name in names]
    common = []
    for entries in zip(*parts, strict=False):
        if len(set(entries)) > 1:
            break
        common.append(entries[0])
    return ".".join(common)
