"""Matching: finds a rule's pattern with a given node as its last one, or says where the best attempt stopped.

All orders of commutative arguments, all alternatives and all candidates for further outputs are tried; each way in
which a part matches is yielded in turn, so what a later part needs decides between them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from skink.graph.pattern import (
    AnyOf,
    Call,
    Match,
    NoMatch,
    Rule,
    Variable,
    below_widening,
    float_bits,
    is_cast,
    kind_fits,
    op_name,
    parts,
)
from skink.graph.solver import MISSING, Partial, arguments_of, equal, given_beyond, solve


def find(rule: Rule, node: fx.Node) -> Match | None:
    """The rule's pattern with `node` as its first output, before its check, or None: `explain` without a reason.

    A reason costs an order of magnitude more than an answer, and almost all answers are no.
    """
    found = solve(rule.outputs[0], node)
    if found is None:
        return None
    if len(rule.outputs) == 1 and _objection(rule, found) is None:
        return _as_match(found)
    explained = explain(rule, node)
    return explained if isinstance(explained, Match) else None


def explain(rule: Rule, node: fx.Node) -> Match | NoMatch:
    """The rule's pattern with `node` as its first output, before its check; else the reason of the best attempt.

    Casts at the very end are not part of a match.
    """
    search = _Search()
    for found in search.outputs(rule.outputs, node):
        objection = _objection(rule, found)
        if objection is None:
            return _as_match(found)
        search.fail(found, objection.reason, objection.node)
    if search.failure is None:
        raise TypeError(f"the pattern of rule {rule.name} neither matched nor failed")
    return search.failure


class _Search:
    """One attempt to match, which remembers the failure that came furthest."""

    def __init__(self) -> None:
        self.failure: NoMatch | None = None

    def fail(self, partial: Partial, reason: str, node: fx.Node) -> None:
        if self.failure is None or partial.steps > self.failure.progress:
            self.failure = NoMatch(reason, node, partial.steps)

    def outputs(self, outputs: Sequence[Call], node: fx.Node) -> Iterator[Partial]:
        for partial in self._call(outputs[0], node, Partial({})):
            yield from self._further(outputs[1:], replace(partial, roots=(node,)))

    def _further(self, outputs: Sequence[Call], partial: Partial) -> Iterator[Partial]:
        """The outputs after the first are looked for among the users of what the first ones bound."""
        if not outputs:
            yield partial
            return
        candidates = [node for node in _candidates(outputs[0], partial) if node not in partial.roots]
        if not candidates:
            self.fail(partial, f"no {' or '.join(outputs[0].names)} beside it", partial.roots[0])
        for node in candidates:
            for found in self._call(outputs[0], node, partial):
                yield from self._further(outputs[1:], replace(found, roots=(*partial.roots, node)))

    def _call(self, pattern: Call, node: fx.Node, partial: Partial) -> Iterator[Partial]:
        if op_name(node) not in pattern.names:
            self.fail(partial, f"{' or '.join(pattern.names)} expected, found {op_name(node) or node.op}", node)
            return
        bound = partial.bindings.get(id(pattern), node)
        if bound is not node:
            self.fail(partial, f"one {pattern.names[0]} is meant twice, and there are two", node)
            return
        wanted = pattern.arguments
        if wanted and wanted[-1] is ...:
            wanted = wanted[:-1]
        elif unmentioned := given_beyond(node, len(wanted)):
            self.fail(partial, f"{unmentioned} is given", node)
            return
        given = arguments_of(node, len(wanted))
        partial = replace(partial, bindings={**partial.bindings, id(pattern): node}, steps=partial.steps + 1)
        yield from self._all(wanted, given, node, partial)
        if pattern.commutes:
            yield from self._all(wanted, (given[1], given[0]), node, partial)

    def _all(self, wanted: Sequence[Any], found: Sequence[Any], user: fx.Node, partial: Partial) -> Iterator[Partial]:
        if not wanted:
            yield partial
            return
        for one in self._value(wanted[0], found[0], user, partial):
            yield from self._all(wanted[1:], found[1:], user, one)

    def _value(self, wanted: Any, found: Any, user: fx.Node, partial: Partial) -> Iterator[Partial]:
        if isinstance(wanted, Call):
            yield from self._below_casts(wanted, found, user, partial)
        elif isinstance(wanted, AnyOf):
            for alternative in wanted.alternatives:
                yield from self._value(alternative, found, user, partial)
        elif isinstance(wanted, Variable):
            yield from self._variable(wanted, found, user, partial)
        elif isinstance(wanted, list | tuple):
            if isinstance(found, list | tuple) and len(found) == len(wanted):
                yield from self._all(wanted, found, user, partial)
            else:
                self.fail(partial, f"{list(wanted)} expected, found {found!r}", user)
        elif equal(wanted, found, user):
            yield replace(partial, steps=partial.steps + 1)
        elif found is MISSING:
            self.fail(partial, f"{wanted!r} expected, found no such argument", user)
        else:
            self.fail(partial, f"{wanted!r} expected, found {found!r}", user)

    def _variable(self, wanted: Variable, found: Any, user: fx.Node, partial: Partial) -> Iterator[Partial]:
        if found is MISSING:
            self.fail(partial, f"{wanted.name} is not given", user)
            return
        value = below_widening(found)
        if wrong := kind_fits(wanted.kind, value):
            self.fail(partial, f"{wanted.name} {wrong}", user)
            return
        bound = partial.bindings.get(wanted.name, value)
        if bound is value or (not isinstance(bound, fx.Node) and type(bound) is type(value) and bound == value):
            yield replace(partial, bindings={**partial.bindings, wanted.name: value}, steps=partial.steps + 1)
        else:
            self.fail(partial, f"{wanted.name} is used twice, for two different values", user)

    def _below_casts(self, wanted: Call, found: Any, user: fx.Node, partial: Partial) -> Iterator[Partial]:
        casts = []
        while isinstance(found, fx.Node) and is_cast(found):
            if not float_bits(found):
                self.fail(partial, f"{wanted.names[0]} expected, found a cast to {found.meta['val'].dtype}", found)
                return
            casts.append(found)
            found = found.args[0]
        if not isinstance(found, fx.Node):
            shown = "no such argument" if found is MISSING else repr(found)
            self.fail(partial, f"{wanted.names[0]} expected, found {shown}", user)
            return
        yield from self._call(wanted, found, replace(partial, casts=(*partial.casts, *casts)))


def _objection(rule: Rule, found: Partial) -> NoMatch | None:
    """Why a structural match does not count."""
    if found.casts:
        values = [value for key, value in found.bindings.items() if isinstance(key, str)]
        least = min((bits for value in values if (bits := float_bits(value))), default=0)
        for cast in found.casts:
            if float_bits(cast) < least:
                return NoMatch(f"{cast.meta['val'].dtype} on the way loses digits that the pattern keeps", cast)
    if rule.exclusive:
        objection = _used_outside(_as_match(found))
        if objection is not None:
            return objection
    return _not_at_one_place(_as_match(found)) if len(found.roots) > 1 else None


def _candidates(output: Call, partial: Partial) -> list[fx.Node]:
    """Nodes that could be an output, found from a value that is bound already, along the users."""
    key, path = next(
        (key, path)
        for part, path in _paths(output)
        if (key := _key(part)) in partial.bindings and _is_node(partial, key)
    )
    found = [partial.bindings[key]]
    for call in path:
        found = [user for node in found for user in _users(node) if op_name(user) in call.names]
    return sorted(dict.fromkeys(found))


def _paths(output: Call) -> Iterator[tuple[Any, list[Call]]]:
    """Every part of a pattern with the calls that lead from it to the output."""
    for argument in output.arguments:
        for part in parts(argument):
            if isinstance(part, Variable | Call):
                yield part, [*_calls_between(argument, part), output]


def _calls_between(pattern: Any, part: Any) -> list[Call]:
    """The calls around `part` within `pattern`, innermost first."""
    if pattern is part:
        return []
    inner = pattern.arguments if isinstance(pattern, Call) else getattr(pattern, "alternatives", pattern)
    for entry in inner if isinstance(inner, list | tuple) else ():
        if any(part is candidate for candidate in parts(entry)):
            own = [pattern] if isinstance(pattern, Call) else []
            return [*_calls_between(entry, part), *own]
    return []


def _key(part: Any) -> str | int:
    return part.name if isinstance(part, Variable) else id(part)


def _is_node(partial: Partial, key: str | int) -> bool:
    return isinstance(partial.bindings[key], fx.Node)


def _users(node: fx.Node) -> Iterator[fx.Node]:
    """Those who read a value, through casts."""
    for user in node.users:
        if is_cast(user):
            yield from _users(user)
        else:
            yield user


def _as_match(found: Partial) -> Match:
    calls = [value for key, value in found.bindings.items() if isinstance(key, int)]
    names = {key: value for key, value in found.bindings.items() if isinstance(key, str)}
    return Match(found.roots[0], names, found.roots, tuple(dict.fromkeys([*calls, *found.casts])))


def _used_outside(found: Match) -> NoMatch | None:
    """Why an exclusive rule does not apply: an inner value that something else reads too."""
    for node in found.nodes:
        if node not in found.roots:
            for user in node.users:
                if user not in found.nodes:
                    return NoMatch(f"{op_name(user) or user.op} outside of the match reads an inner value", node)
    return None


def _not_at_one_place(found: Match) -> NoMatch | None:
    """Why several outputs cannot be computed where the first stands: something that they need comes later."""
    if len(found.roots) > 1:
        first = min(found.roots)
        for name, value in found.bindings.items():
            if isinstance(value, fx.Node) and value.op == "call_function" and not value < first:
                return NoMatch(f"{name} comes after the first of the outputs", value)
    return None
