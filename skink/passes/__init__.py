"""The passes that ship, listed here, and those of other packages, found by their entry points."""

from functools import lru_cache
from importlib.metadata import entry_points

from skink.errors import RecipeError, suggest
from skink.graph.passes import Pass
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose import LowRank

PASSES: tuple[type[Pass], ...] = (Canonicalize, LowRank)


@lru_cache(maxsize=1)
def all_passes() -> dict[str, type[Pass]]:
    """Every pass by name: ours, then those of the entry-point group `skink.passes`."""
    found = {entry.name: entry for entry in PASSES}
    for point in entry_points(group="skink.passes"):
        loaded: type[Pass] = point.load()
        found.setdefault(loaded.name, loaded)
    return found


def find_pass(name: str) -> type[Pass]:
    """The pass of this name.

    Raises:
        RecipeError: RECIPE-001 with the valid names and the nearest.
    """
    passes = all_passes()
    if name not in passes:
        raise RecipeError("RECIPE-001", f"there is no pass {name!r}.", fix=suggest(name, list(passes)))
    return passes[name]
