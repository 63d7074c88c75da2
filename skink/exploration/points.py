"""The points of a space for one model: every combination of values as a recipe, parsed before anything runs."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from skink.errors import SkinkError, SpaceError, check_range
from skink.exploration.axes import ModelFacts, read_axis
from skink.exploration.conditions import read_condition
from skink.exploration.space import Family, Space
from skink.graph.pipeline import Pipeline
from skink.passes import find_pass
from skink.passes.canonicalize import Canonicalize
from skink.passes.recipe import Recipe, load_recipe, parse_passes

# More points than this are not written out; beyond it a family is sampled by number.
_MOST = 100_000
# How many numbers are drawn for each point wanted, where conditions refuse most.
_DRAWS = 200


@dataclass(frozen=True)
class Point:
    """One recipe of a space.

    Args:
        family: the family that it is of; empty for the dense model.
        values: of the family's axes.
        recipe: parsed and checked.
    """

    family: str
    values: Mapping[str, Any]
    recipe: Recipe

    @property
    def text(self) -> str:
        """The recipe with every option: what the point is known by."""
        return self.recipe.describe()


DENSE = Point("", {}, Recipe(()))


def expand(space: Space, facts: ModelFacts, *, most: int | None = None, seed: int = 0) -> tuple[Point, ...]:
    """Every point of a space, each recipe once, in the order of the families and their axes.

    Args:
        space: see `skink.exploration.space`.
        facts: of the model.
        most: at most so many points, drawn by `seed`.
        seed: of that draw.

    Raises:
        SpaceError: SPACE-002 for axes and conditions, -003 for a recipe that cannot be, -004 for no or too many points.
    """
    if most is not None:
        check_range("max_points", most, low=1, high=2**31)
    points: dict[str, Point] = {}
    for family in space.families:
        where = f"family {family.name!r} of the space {space.name!r}"
        for values in _combinations(where, family, facts):
            point = Point(family.name, values, _recipe(where, family, values))
            points.setdefault(point.text, point)
    points.pop(DENSE.text, None)
    if not points:
        raise SpaceError(
            "SPACE-004",
            f"the space {space.name!r} has no points for this model.",
            why=f"the model has {len(facts.layers)} blocks with {len(facts.tensors)} tensors each.",
            fix="loosen its conditions.",
        )
    chosen = list(points.values())
    if most is not None and most < len(chosen):
        kept = {point.text for point in sorted(chosen, key=lambda point: _draw(seed, point.text))[:most]}
        chosen = [point for point in chosen if point.text in kept]
    return tuple(chosen)


def _combinations(where: str, family: Family, facts: ModelFacts) -> Iterator[dict[str, Any]]:
    """The values of each point of a family."""
    axes = {name: read_axis(where, name, value, facts) for name, value in family.axes.items()}
    conditions = [read_condition(where, text, tuple(axes)) for text in family.where]
    total = prod(len(values) for values in axes.values())
    if total <= _MOST:
        fitting = [number for number in range(total) if all(meets(_values(axes, number)) for meets in conditions)]
        if family.sample is not None and family.sample < len(fitting):
            drawn = sorted(fitting, key=lambda number: _draw(family.seed, str(number)))
            fitting = sorted(drawn[: family.sample])
        yield from (_values(axes, number) for number in fitting)
        return
    if family.sample is None:
        raise SpaceError(
            "SPACE-004",
            f"the space has {total:,} points, and {_MOST:,} are the most that are run without a sample.",
            where=where,
            fix="add sample: 200 to the family, or take values from its axes.",
        )
    seen: set[int] = set()
    for draw in range(_DRAWS * family.sample):
        number = _draw(family.seed, f"draw {draw}") % total
        values = _values(axes, number)
        if number in seen or not all(meets(values) for meets in conditions):
            continue
        seen.add(number)
        yield values
        if len(seen) == family.sample:
            return


def _values(axes: Mapping[str, Sequence[Any]], number: int) -> dict[str, Any]:
    """Combination `number`, the last axis running fastest."""
    values: dict[str, Any] = {}
    for name in reversed(list(axes)):
        number, place = divmod(number, len(axes[name]))
        values[name] = axes[name][place]
    return {name: values[name] for name in axes}


def _recipe(where: str, family: Family, values: Mapping[str, Any]) -> Recipe:
    filled = family.fill(values)
    try:
        # A name alone may be a recipe that ships.
        recipe = load_recipe(filled) if isinstance(filled, str) else Recipe(tuple(_passes(filled)))
        Pipeline((Canonicalize(), *recipe.passes))
    except SkinkError as error:
        raise SpaceError(
            "SPACE-003",
            f"a point is no recipe: {error.what}",
            where=f"{where}, at {_said(values)}",
            why=error.why,
            fix=error.fix,
        ) from error
    return recipe


def _passes(entries: Sequence[Any]) -> Iterator[Any]:
    for entry in entries:
        if isinstance(entry, str):
            yield from parse_passes(entry)
        elif isinstance(entry, dict) and len(entry) == 1 and isinstance(next(iter(entry.values())), dict | None):
            ((name, options),) = entry.items()
            yield find_pass(str(name)).from_options(options or {})
        else:
            raise SpaceError(
                "SPACE-003",
                f"an entry of it is {entry!r}.",
                fix="write `- low-rank: {keep: $keep}` or one line of text.",
            )


def _said(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items()) or "its only point"


def _draw(seed: int, text: str) -> int:
    """A number that looks random and depends on nothing but its arguments."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{text}".encode()).digest()[:8], "big")
