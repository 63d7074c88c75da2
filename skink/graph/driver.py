"""Applies rules to a program until none matches any more.

Rules are indexed by the op that their pattern ends in, so the graph is walked once for all of them. What a rewrite
could have made possible, the nodes that it made and those downstream of them as far as patterns reach, is tried again.
"""

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from skink.errors import RewriteError
from skink.graph.matcher import explain, find
from skink.graph.pattern import Match, NoMatch, Rule, is_cast, is_cast_to, op_name
from skink.graph.program import Program
from skink.graph.rewriter import Rewriter, describe
from skink.settings import settings

# A node this many rewrites away from one that was there at first is taken for proof of a cycle.
_LONGEST_LINEAGE = 64

_log = logging.getLogger("skink.match")


def apply_rules(program: Program, rewriter: Rewriter, rules: Sequence[Rule]) -> dict[str, list[NoMatch]]:
    """Apply every rule wherever it matches, until none does; of those that match at one node the first is applied.

    With `SKINK_TRACE_MATCH` set to a rule's name or how it begins, the logger `skink.match` says what became of that
    rule: each check that refused, and the best partial match where nothing matched at all.

    Returns:
        For each rule, the structural matches that its check refused.

    Raises:
        RewriteError: REWRITE-001 where rules undo each other without end.
    """
    driver = _Driver(program, rewriter, rules)
    driver.run()
    rewriter.finish()
    return driver.refused()


@dataclass(frozen=True)
class _Lineage:
    """How a node came about: the rule that made it and the lineage of what that rule replaced."""

    rule: str
    parent: "_Lineage | None"
    length: int


class _Driver:
    def __init__(self, program: Program, rewriter: Rewriter, rules: Sequence[Rule]) -> None:
        self.program = program
        self.rewriter = rewriter
        self.by_root: dict[str, list[Rule]] = {}
        for rule in rules:
            for name in rule.outputs[0].names:
                self.by_root.setdefault(name, []).append(rule)
        # One more than the calls of a pattern: what its arguments stand for may decide, too.
        self.reach = 1 + max((rule.depth for rule in rules), default=0)
        # Such rules can come to match at nodes that lie beside or before what changed.
        self.looks_around = any(rule.exclusive or len(rule.outputs) > 1 for rule in rules)
        self.pending: deque[fx.Node] = deque()
        self.queued: set[fx.Node] = set()
        self.lineage: dict[fx.Node, _Lineage] = {}
        self.refusals: dict[tuple[str, fx.Node], NoMatch] = {}
        self.trace = _Trace(rules)

    def run(self) -> None:
        self._queue(self.program.graph.nodes)
        while self.pending:
            node = self.pending.popleft()
            self.queued.discard(node)
            if node.users and not node._erased:
                self._try_rules(node)
        self.trace.report()

    def refused(self) -> dict[str, list[NoMatch]]:
        refused: dict[str, list[NoMatch]] = {}
        for (rule, node), reason in self.refusals.items():
            if not node._erased:
                refused.setdefault(rule, []).append(reason)
        return refused

    def _queue(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            if node not in self.queued and op_name(node) in self.by_root:
                self.queued.add(node)
                self.pending.append(node)

    def _try_rules(self, node: fx.Node) -> None:
        for rule in self.by_root[op_name(node)]:
            found = self.trace.find(rule, node)
            if found is None:
                continue
            try:
                if self._apply(rule, found):
                    return
            except Exception as error:
                error.add_note(f"in rule {rule.name}, at {describe(node)}")
                raise

    def _apply(self, rule: Rule, found: Match) -> bool:
        """Whether the rule's check let it rewrite the match."""
        reason = rule.check(found)
        if reason is not None:
            self.refusals[rule.name, found.root] = reason
            return False
        self.refusals.pop((rule.name, found.root), None)
        return self._rewrite(rule, found)

    def _rewrite(self, rule: Rule, found: Match) -> bool:
        if self.rewriter.exhausted:
            return False
        lineage = self._lineage(rule, found)
        roots = found.roots
        with self.rewriter.before(min(roots)), self.rewriter.watching() as made:
            result = rule.rewrite(self.rewriter, found)
            results = [result] if isinstance(result, fx.Node) else list(result)
            if len(results) != len(roots) or any(new in roots for new in results):
                raise TypeError(f"rule {rule.name} must return one other node for each of its {len(roots)} outputs")
            results = [self._in_dtype_of(old, new, rule) for old, new in zip(roots, results, strict=True)]
        affected = self._around(found.nodes) if self.looks_around else []
        self.rewriter.replace_all(dict(zip(roots, results, strict=True)), rule=rule.name)
        self.lineage.update((node, lineage) for node in made)
        for root in roots:
            self.rewriter.erase_dead(root)
        self._queue(made)
        self._queue(self._downstream([*made, *results, *affected]))
        return True

    def _in_dtype_of(self, old: fx.Node, new: fx.Node, rule: Rule) -> fx.Node:
        wanted, made = old.meta["val"].dtype, new.meta["val"].dtype
        if made == wanted or is_cast_to(old, made):
            return new
        return self.rewriter.call(torch.ops.aten.to.dtype, new, wanted, rule=rule.name)

    def _lineage(self, rule: Rule, found: Match) -> _Lineage:
        ancestors = [self.lineage[node] for node in found.nodes if node in self.lineage]
        parent = max(ancestors, key=lambda entry: entry.length, default=None)
        lineage = _Lineage(rule.name, parent, parent.length + 1 if parent is not None else 1)
        if lineage.length > _LONGEST_LINEAGE:
            raise RewriteError(
                "REWRITE-001",
                f"rules of pass {self.rewriter.pass_name} undo each other without end: {_cycle(lineage)}.",
                where=describe(found.root),
                why=f"This node is the result of {lineage.length - 1} rewrites of what was one node.",
                fix="let the check of one of these rules refuse what another makes.",
            )
        return lineage

    def _around(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """What the matched nodes read, as far back as patterns reach."""
        reached: dict[fx.Node, None] = {}
        front = list(nodes)
        for _ in range(self.reach):
            front = [node for entry in front for node in entry.all_input_nodes if node.op == "call_function"]
            reached.update(dict.fromkeys(front))
        return list(reached)

    def _downstream(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Users of the nodes, and theirs, as far as patterns reach; casts do not count as steps."""
        reached: dict[fx.Node, None] = {}
        front = [node for node in nodes if not node._erased]
        for _ in range(self.reach):
            readers: list[fx.Node] = []
            while front:
                for user in front.pop().users:
                    if user not in reached:
                        reached[user] = None
                        (front if is_cast(user) else readers).append(user)
            front = readers
        return list(reached)


def _cycle(lineage: _Lineage) -> str:
    """The rules that repeat at the end of a lineage: `a -> b -> a`."""
    names: list[str] = []
    entry: _Lineage | None = lineage
    while entry is not None:
        names.insert(0, entry.rule)
        entry = entry.parent
    for length in range(1, len(names) // 2):
        if names[-length:] == names[-2 * length : -length]:
            turns = names[-length:]
            first = min(range(length), key=lambda index: names.index(turns[index]))
            return " -> ".join([*turns[first:], *turns[: first + 1]])
    return " -> ".join(dict.fromkeys(names))


class _Trace:
    """Watches the rule that SKINK_TRACE_MATCH names, and logs what became of it."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        prefix = settings().trace_match
        self.best: dict[str, NoMatch | None] = {
            rule.name: None for rule in rules if prefix and rule.name.startswith(prefix)
        }
        self.matches: dict[str, int] = dict.fromkeys(self.best, 0)

    def find(self, rule: Rule, node: fx.Node) -> Match | None:
        if rule.name not in self.best:
            return find(rule, node)
        found = explain(rule, node)
        if isinstance(found, NoMatch):
            best = self.best[rule.name]
            if best is None or found.progress > best.progress:
                self.best[rule.name] = found
            return None
        self.matches[rule.name] += 1
        reason = rule.check(found)
        if reason is not None:
            _log.warning("%s: matched at %s; refused: %s", rule.name, describe(node), reason.reason)
        return found

    def report(self) -> None:
        for name, best in self.best.items():
            _log.warning("%s: %d structural matches", name, self.matches[name])
            if best is not None:
                where = describe(best.node)
                _log.warning(
                    "%s: best partial match stops after %d values at %s: %s", name, best.progress, where, best.reason
                )
