"""Cut two programs at the same places, into pieces that can be trained apart.

A piece is a layer of the original and what has become of it in the program. A layer is what lies below one number of a
list of modules (`model.layers.3`, skink/graph/provenance.py); of several such lists, the one between whose members the
fewest values are carried on. A cut lies where a layer of the same name begins in both programs, if both carry values of
the same shapes past it. Layers without such a cut between them make up one piece, and so do layers that read one
trained weight.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, fx

from skink.errors import RecoveryError
from skink.graph.program import Program
from skink.graph.propagate import shape_context
from skink.graph.regions import derived_from_inputs, plan_region
from skink.graph.token_axis import size_of

Values = tuple[fx.Node, ...]


@dataclass(frozen=True)
class Cut:
    """A place between two layers.

    Args:
        before: name of the layer of the original that ends there; empty before the first.
        name: of the layer that begins there; empty behind the last.
        teacher: what is alive there in the original; nothing where the first layer reads the inputs.
        student: the corresponding values of the program, in the same order.
    """

    before: str
    name: str
    teacher: Values
    student: Values


@dataclass(frozen=True)
class Piece:
    """What lies between two cuts of both programs.

    Args:
        index: its place among the pieces.
        name: of its layers: `model.layers.3`, or `model.layers.2 to model.layers.3`.
        begin: the cut before it.
        end: the cut behind it.
        trained: names of the program's weights that train in it, which nothing outside it reads.
    """

    index: int
    name: str
    begin: Cut
    end: Cut
    trained: tuple[str, ...]


def cut_pieces(original: Program, program: Program, trained: Collection[str]) -> tuple[Piece, ...]:
    """The pieces, in order; what lies before the first layer and behind the last is in none.

    Args:
        original: canonical.
        program: made from it, or from a model of the same structure.
        trained: names of weights of `program` that may train.

    Raises:
        RecoveryError: RECOVER-007 where there are no two cuts that both programs have.
    """
    cuts = _common_cuts(original, program)
    if len(cuts) < 2:
        raise RecoveryError(
            "RECOVER-007",
            "the two programs have no layers in common that could be matched one by one.",
            why="a layer has to begin and to end with the same values in both, of the same shapes and from the same "
            "modules, and nothing else may be carried past these places.",
            fix="name a teacher of the same structure, or match hidden states or logits of the whole model.",
        )
    reads = [_weights_between(program, one, two, trained) for one, two in pairwise(cuts)]
    spans = _joined(reads)
    inside: dict[str, int] = {}
    for place, (first, last) in enumerate(spans):
        inside.update(dict.fromkeys(set[str]().union(*reads[first:last]), place))
    outside = _read_elsewhere(program, cuts, trained)
    pieces = []
    for place, (first, last) in enumerate(spans):
        names = tuple(name for name in trained if inside.get(name) == place and name not in outside)
        one, two = cuts[first].name, cuts[last].before
        name = one if one == two else f"{one} to {two}"
        pieces.append(Piece(place, name, cuts[first], cuts[last], names))
    return tuple(pieces)


def _common_cuts(original: Program, program: Program) -> list[Cut]:
    teacher, student = _Timeline(original), _Timeline(program)
    path = teacher.layers()
    theirs = dict(student.places(path)) if path is not None else {}
    cuts = []
    before = ""
    for name, place in teacher.places(path) if path is not None else ():
        if name in theirs:
            one, two = teacher.alive(place), student.alive(theirs[name])
            if [_shape(node) for node in one] == [_shape(node) for node in two] and (one or place == theirs[name] == 0):
                cuts.append(Cut(before, name, one, two))
        before = name
    return cuts


def _weights_between(program: Program, begin: Cut, end: Cut, names: Collection[str]) -> set[str]:
    plan = plan_region(program.graph, end.student, begin.student)
    return {str(node.target) for node, _ in plan if node.op == "get_attr" and node.target in names}


def _read_elsewhere(program: Program, cuts: Sequence[Cut], names: Collection[str]) -> set[str]:
    """Weights that are read before the first cut, or behind the last."""
    output = program.graph.output_node()
    before = plan_region(program.graph, cuts[0].student, ())
    behind = plan_region(program.graph, [output], cuts[-1].student)
    return {str(node.target) for node, _ in (*before, *behind) if node.op == "get_attr" and node.target in names}


def _joined(reads: Sequence[set[str]]) -> list[tuple[int, int]]:
    """(first, last + 1) of the runs of layers that no weight is shared between."""
    last = {name: index for index, names in enumerate(reads) for name in names}
    spans, begin, end = [], 0, 0
    for index, names in enumerate(reads):
        end = max([end, index, *(last[name] for name in names)])
        if end == index:
            spans.append((begin, index + 1))
            begin = index + 1
    return spans


class _Timeline:
    """A program's calls in order, without those that depend on its inputs alone, and how long their values live."""

    def __init__(self, program: Program) -> None:
        shape_context(program)
        self._program = program
        derived = derived_from_inputs(program)
        output = program.graph.output_node()
        needed = [node for node, _ in plan_region(program.graph, [output], ()) if node.op == "call_function"]
        self._order = [node for node in needed if node not in derived]
        place = {node: index for index, node in enumerate(self._order)}
        self._last = {
            node: max(place.get(user, len(self._order)) for user in node.users if user in place or user is output)
            for node in self._order
        }
        self._spans = _numbered(self._order)

    def alive(self, place: int) -> Values:
        """The values that are made before the call at `place`, and read by it or after it."""
        return tuple(node for node in self._order[:place] if self._last[node] >= place)

    def layers(self) -> str | None:
        """Which list of modules the layers are: `model.layers`; None where there is none to cut at."""
        best: tuple[tuple[int, int], str] | None = None
        for path, spans in self._spans.items():
            if any(one.stop > two.start for one, two in pairwise(spans.values())):
                continue
            carried = [self.alive(place) for _, place in self.places(path) if place]
            price = (max(map(len, carried)), -len(spans))
            if all(self._has_rows(node) for nodes in carried for node in nodes) and (best is None or price < best[0]):
                best = price, path
        return best[1] if best is not None else None

    def places(self, path: str) -> list[tuple[str, int]]:
        """(name of a layer, place where it begins) of a list of modules, and ("", place) of the last one's end."""
        spans = self._spans.get(path, {})
        end = max((span.stop for span in spans.values()), default=0)
        return [*((f"{path}.{name}".lstrip("."), span.start) for name, span in spans.items()), ("", end)]

    def _has_rows(self, node: fx.Node) -> bool:
        """Whether a value is a tensor with one row for each window."""
        value, first = node.meta.get("val"), next(iter(self._program.graph.find_nodes(op="placeholder"))).meta["val"]
        return isinstance(value, Tensor) and value.dim() > 0 and size_of(value.shape[0]) == size_of(first.shape[0])


def _numbered(order: Sequence[fx.Node]) -> dict[str, dict[str, range]]:
    """Of each list of modules, where the calls of each of its members begin and end, in order."""
    found: dict[str, dict[str, range]] = {}
    for place, node in enumerate(order):
        parts = str(node.meta.get("module", "")).split(".")
        for index, part in enumerate(parts):
            if part.isdecimal():
                spans = found.setdefault(".".join(parts[:index]), {})
                spans[part] = range(spans[part].start if part in spans else place, place + 1)
    return found


def _shape(node: fx.Node) -> list[Any] | None:
    """The sizes of a value that are numbers, None for those that are not."""
    value = node.meta.get("val")
    return [size if isinstance(size, int) else None for size in value.shape] if isinstance(value, Tensor) else None
