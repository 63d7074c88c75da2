"""The passes that ship, listed here, and those of other packages, found by their entry points."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from skink.errors import RecipeError, suggest
from skink.graph.passes import Pass
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose import BasisSharing, LowRank, ReduceWidth, Tucker
from skink.passes.recover import Recover

PASSES: tuple[type[Pass], ...] = (Canonicalize, LowRank, Tucker, BasisSharing, ReduceWidth, Recover)


@dataclass(frozen=True)
class BrokenPass:
    """A pass of another package that cannot be had: the name of its entry point, the package, and why."""

    name: str
    package: str
    reason: str


@dataclass(frozen=True)
class Discovered:
    """Every pass by name, ours first; the packages that others are of, by pass; and those that cannot be had."""

    passes: Mapping[str, type[Pass]]
    packages: Mapping[str, str]
    broken: tuple[BrokenPass, ...]


@lru_cache(maxsize=1)
def discover() -> Discovered:
    """Our passes, and those of the entry-point group `skink.passes`, each loaded once."""
    passes = {entry.name: entry for entry in PASSES}
    packages: dict[str, str] = {}
    broken: list[BrokenPass] = []
    for point in entry_points(group="skink.passes"):
        package = point.dist.name if point.dist is not None else point.module.partition(".")[0]
        try:
            loaded = _load(point)
        # A stranger's import may raise anything, and must not stop what does without it.
        except Exception as error:
            broken.append(BrokenPass(point.name, package, f"{type(error).__name__}: {error}"))
            continue
        if loaded.name not in passes:
            passes[loaded.name] = loaded
            packages[loaded.name] = package
    return Discovered(passes, packages, tuple(broken))


def _load(point: EntryPoint) -> type[Pass]:
    loaded = point.load()
    if not (isinstance(loaded, type) and issubclass(loaded, Pass) and isinstance(getattr(loaded, "name", None), str)):
        raise TypeError("the entry point names no subclass of Pass with a name")
    return loaded


def all_passes() -> dict[str, type[Pass]]:
    """Every pass by name: ours, then those of other packages that can be imported."""
    return dict(discover().passes)


def find_pass(name: str) -> type[Pass]:
    """The pass of this name.

    Raises:
        RecipeError: RECIPE-001 with the valid names and the nearest, RECIPE-004 where its package cannot be imported.
    """
    found = discover()
    if name in found.passes:
        return found.passes[name]
    for broken in found.broken:
        if broken.name == name:
            raise RecipeError(
                "RECIPE-004",
                f"the pass {name!r} of the package {broken.package!r} cannot be imported.",
                why=broken.reason,
                fix=f"repair or update {broken.package}, or leave the pass out.",
            )
    raise RecipeError("RECIPE-001", f"there is no pass {name!r}.", fix=suggest(name, list(found.passes)))
