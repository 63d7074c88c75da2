"""What a canonical program still holds of idioms that have an op, and why each was not raised."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from skink.graph.blocks import FeedForward
from skink.graph.loose_activations import loose_activations
from skink.graph.matcher import explain
from skink.graph.pattern import Match, NoMatch, Rule, op_name
from skink.graph.program import Program
from skink.graph.rewriter import describe
from skink.passes.canonicalize.raise_rules import RULES

# What each idiom cannot be written without, and how the names of the rules that raise it begin.
_SIGNS = {
    "attention": ("softmax", "_softmax", "_safe_softmax", "scaled_dot_product_attention"),
    "norm": ("rsqrt", "var", "var_mean", "std", "std_mean", "linalg_vector_norm"),
}
_RULES = {
    "attention": tuple(rule for rule in RULES if rule.name.startswith("raise-attention")),
    "norm": tuple(rule for rule in RULES if "-norm" in rule.name),
}
# How many calls after the sign the last call of its idiom is looked for.
_REACH = 6


@dataclass(frozen=True)
class Leftover:
    """Something that was not raised.

    Args:
        what: `attention`, `norm`, `activation`, or empty where a rule says it all.
        operator: the one that stands in the graph.
        module: qualified name of the module that calls it.
        source: file and line.
        where: all of these as messages say them.
        reason: why.
    """

    what: str
    operator: str
    module: str
    source: str
    where: str
    reason: str


def leftovers(program: Program, blocks: Sequence[FeedForward], refused: Iterable[NoMatch]) -> list[Leftover]:
    """In the graph's order: what was left of attention, norms and activations, then what else rules refused.

    Args:
        program: canonical.
        blocks: its feed-forward blocks; what belongs to one, or to a router, is where it should be.
        refused: matches that the rules' checks refused.
    """
    inside = {node for block in blocks for part in (block, *block.shared) for node in part.nodes}
    found: dict[fx.Node, Leftover] = {}
    told: set[tuple[fx.Node, str]] = set()
    for node in program.graph.nodes:
        what = next((what for what, names in _SIGNS.items() if op_name(node) in names), "")
        if what and node not in inside:
            reason = _explained(node, _RULES[what])
            told |= {(node, reason.reason), (reason.node, reason.reason)}
            beside = "" if reason.node is node else f", at %{reason.node.name}"
            found[node] = _leftover(what, node, reason.reason + beside)
    for loose in loose_activations(program, blocks):
        found[loose.node] = _leftover("activation", loose.node, loose.reason)
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    others = [
        _leftover("", entry.node, entry.reason)
        for entry in refused
        if entry.node in order and (entry.node, entry.reason) not in told
    ]
    return [*(found[node] for node in sorted(found, key=order.__getitem__)), *others]


def _leftover(what: str, node: fx.Node, reason: str) -> Leftover:
    module, source = str(node.meta.get("module") or ""), str(node.meta.get("source") or "")
    return Leftover(what, op_name(node) or node.op, module, source, describe(node), reason)


def _explained(node: fx.Node, rules: Sequence[Rule]) -> NoMatch:
    """Why none of the rules matches around a node: the reason of the attempt that came furthest."""
    best: NoMatch | None = None
    for root in _downstream(node):
        for rule in rules:
            if op_name(root) not in rule.outputs[0].names:
                continue
            found = explain(rule, root)
            if isinstance(found, Match):
                if node not in (*found.nodes, *found.roots):
                    continue
                refused = rule.check(found)
                if refused is not None:
                    return refused
            elif best is None or found.progress > best.progress:
                best = found
    if best is not None:
        return best
    if any(op_name(reader) == "topk" for reader in _downstream(node)):
        return NoMatch("it is a router's, and the experts behind it were not raised", node)
    return NoMatch(f"nothing that could end its idiom reads it within {_REACH} calls", node)


def _downstream(node: fx.Node) -> list[fx.Node]:
    """The node and what reads it, directly or through others, nearest first."""
    found: dict[fx.Node, None] = {node: None}
    frontier = [node]
    for _ in range(_REACH):
        frontier = [user for current in frontier for user in current.users if user not in found]
        # The far side of a product with a weight is another idiom's business.
        frontier = [user for user in dict.fromkeys(frontier) if op_name(user) != "linear"]
        found.update(dict.fromkeys(frontier))
    return list(found)
