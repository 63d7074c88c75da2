"""The values that one axis of a space runs over: as they stand, or subsets of a model's layers or tensors.

Subsets are numbered, and made from their numbers, so that a space of 2^39 points (Moar et al. 2024, arXiv 2405.06626)
can be sampled without being written out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import comb
from typing import Any, Literal

from skink.errors import SpaceError, suggest
from skink.graph.program import Program
from skink.passes.decompose.selection import linear_layers
from skink.passes.decompose.tucker.space import block_of

Arrangement = Literal["any", "spaced", "neighbours"]
_ARRANGEMENTS = ("any", "spaced", "neighbours")
_KEYS = ("subsets", "sizes", "arrangement")


@dataclass(frozen=True)
class ModelFacts:
    """What axes may be about.

    Args:
        layers: numbers of the blocks that have linear layers.
        tensors: names of linear layers within a block, as `self_attn.q_proj`, in the order of the graph.
    """

    layers: tuple[int, ...]
    tensors: tuple[str, ...]

    @classmethod
    def of(cls, program: Program) -> "ModelFacts":
        """Of a program in canonical form: a block is what a number in a layer's qualified name stands for."""
        layers: dict[int, None] = {}
        tensors: dict[str, None] = {}
        for layer in linear_layers(program):
            block, below = block_of(layer.name)
            if block is not None:
                layers[block] = tensors[below] = None
        return cls(tuple(sorted(layers)), tuple(tensors))


@dataclass(frozen=True)
class Subsets(Sequence[list[Any]]):
    """Subsets of a pool, in order of their sizes.

    Args:
        pool: what is chosen from, in order.
        sizes: how many are chosen.
        arrangement: `spaced` takes no two neighbours of the pool, `neighbours` takes runs without a gap.
    """

    pool: tuple[Any, ...]
    sizes: tuple[int, ...]
    arrangement: Arrangement = "any"
    _counts: tuple[int, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "_counts", tuple(accumulate(self._count(size) for size in self.sizes)))

    def __len__(self) -> int:
        return self._counts[-1] if self._counts else 0

    def __getitem__(self, index: Any) -> Any:
        """Subset number `index`."""
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = next(place for place, count in enumerate(self._counts) if index < count)
        number = index - (self._counts[place - 1] if place else 0)
        return [self.pool[each] for each in self._chosen(number, self.sizes[place])]

    def _count(self, size: int) -> int:
        n = len(self.pool)
        if not 1 <= size <= n:
            return 0
        if self.arrangement == "neighbours":
            return n - size + 1
        # Subsets without neighbours are those of a shorter row, each moved on by the number of those before it.
        return comb(n - size + 1, size) if self.arrangement == "spaced" else comb(n, size)

    def _chosen(self, number: int, size: int) -> list[int]:
        if self.arrangement == "neighbours":
            return list(range(number, number + size))
        spaced = self.arrangement == "spaced"
        places = _combination(number, len(self.pool) - (size - 1 if spaced else 0), size)
        return [place + (index if spaced else 0) for index, place in enumerate(places)]


def _combination(number: int, n: int, size: int) -> list[int]:
    """Combination `number` of `size` out of range(n), in lexicographic order."""
    chosen: list[int] = []
    place = 0
    while len(chosen) < size:
        following = comb(n - place - 1, size - len(chosen) - 1)
        if number < following:
            chosen.append(place)
        else:
            number -= following
        place += 1
    return chosen


def read_axis(where: str, name: str, value: Any, facts: ModelFacts) -> Sequence[Any]:
    """The values of an axis as a space's YAML has it: a list, or `{subsets: layers, sizes: [1, 2]}`.

    Args:
        where: the space and family, for messages.
        name: the axis.
        value: a list; or a mapping with `subsets` (`layers`, `tensors` or a list), and where wanted `sizes` (all by
            default) and `arrangement` (`any`, `spaced` or `neighbours`).
        facts: of the model.

    Raises:
        SpaceError: SPACE-002.
    """
    if isinstance(value, list) and value:
        return value
    if not isinstance(value, Mapping) or "subsets" not in value:
        raise _refused(where, name, f"is {value!r}", "give a list of values, or {subsets: layers, sizes: [1, 2]}.")
    for key in value:
        if key not in _KEYS:
            raise _refused(where, name, f"has an unknown key {key!r}", suggest(str(key), _KEYS))
    of = value["subsets"]
    pool = {"layers": facts.layers, "tensors": facts.tensors}.get(of) if isinstance(of, str) else of
    if not isinstance(pool, list | tuple):
        raise _refused(where, name, f"is of subsets of {of!r}", "write layers, tensors, or a list.")
    arrangement = value.get("arrangement", "any")
    if arrangement not in _ARRANGEMENTS:
        raise _refused(where, name, f"has the arrangement {arrangement!r}", suggest(str(arrangement), _ARRANGEMENTS))
    sizes = value.get("sizes", list(range(1, len(pool) + 1)))
    sizes = sizes if isinstance(sizes, list) else [sizes]
    if not sizes or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes):
        raise _refused(where, name, f"has the sizes {sizes!r}", "give whole numbers from 1 on.")
    found = Subsets(tuple(pool), tuple(sizes), arrangement)
    if not len(found):
        raise _refused(where, name, f"has no subset of those sizes among {len(pool)}", "give smaller sizes.")
    return found


def _refused(where: str, name: str, why: str, fix: str) -> SpaceError:
    return SpaceError("SPACE-002", f"the axis {name!r} {why}.", where=where, fix=fix)
