"""Design spaces: families of recipes with axes.

description: what it is for
families:
  - name: ranks
    axes:
      layers: {subsets: layers, sizes: [1, 2], arrangement: spaced}
      tensors: {subsets: tensors, sizes: [1]}
      rank: [1, 16]
    patterns: {targets: "*.$layers.$tensors"}       one pattern for each pair
    recipe: tucker{targets=$targets,rank=$rank}     or a list of passes as in a recipe
    where: len(layers) < 3
    sample: 40

A space of one family may have that family's keys at the top.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from skink.errors import SpaceError, suggest

_SUFFIXES = (".yaml", ".yml")
_SPACE_KEYS = ("name", "description", "families")
_FAMILY_KEYS = ("name", "axes", "patterns", "recipe", "where", "sample", "seed")
_PLACEHOLDER = re.compile(r"\$(\w+)")


@dataclass(frozen=True)
class Family:
    """One family of recipes.

    Args:
        name: as reports show it.
        axes: the axes as the YAML has them; see `skink.exploration.axes.read_axis`.
        patterns: names of further placeholders → text whose placeholders run over the entries of their lists.
        recipe: one line of text, or a list of passes, with placeholders.
        where: conditions, all of which a point must meet.
        sample: at most so many points; None for all.
        seed: of the sample.
    """

    name: str
    axes: Mapping[str, Any]
    recipe: Any
    patterns: Mapping[str, str]
    where: tuple[str, ...] = ()
    sample: int | None = None
    seed: int = 0

    def fill(self, values: Mapping[str, Any]) -> Any:
        """The recipe with the values of a point put in."""
        known = dict(values)
        for name, text in self.patterns.items():
            known[name] = list(_each(text, values))
        return _filled(self.recipe, known, bare=isinstance(self.recipe, str))


@dataclass(frozen=True)
class Space:
    """Families of recipes.

    Args:
        name: of the space.
        description: one line.
        families: at least one.
        text: the YAML it was read from.
    """

    name: str
    description: str
    families: tuple[Family, ...]
    text: str


def shipped_spaces() -> dict[str, str]:
    """Names of the spaces that ship → their YAML."""
    folder = files("skink") / "spaces"
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


def load_space(space: "str | Path | Mapping[str, Any] | Space") -> Space:
    """A space from a YAML file, the name of one that ships, or what such a file holds.

    Raises:
        SpaceError: SPACE-001 unknown or unreadable, -002 axes and placeholders that do not fit together.
    """
    if isinstance(space, Space):
        return space
    if isinstance(space, Mapping):
        return _space(dict(space), "space", yaml.safe_dump(dict(space), sort_keys=False))
    shipped = shipped_spaces()
    if isinstance(space, str) and space in shipped:
        return _parsed(shipped[space], space)
    path = Path(space)
    if path.suffix not in _SUFFIXES:
        raise SpaceError(
            "SPACE-001",
            f"there is no space {str(space)!r}.",
            fix=suggest(str(space), list(shipped)) + " or give a .yaml file.",
        )
    try:
        return _parsed(path.read_text(encoding="utf-8"), path.stem)
    except (OSError, UnicodeDecodeError) as error:
        raise SpaceError(
            "SPACE-001",
            f"the space {str(space)!r} cannot be read.",
            why=str(error),
            fix=f"give a YAML file, or one of the spaces that ship: {', '.join(shipped)}.",
        ) from error


def _parsed(text: str, name: str) -> Space:
    try:
        content = yaml.safe_load(text)
    # Dates and numbers that there are none of are ValueErrors.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpaceError("SPACE-001", f"the space {name!r} is not YAML.", why=str(error)) from error
    if not isinstance(content, dict):
        raise SpaceError(
            "SPACE-001", f"the space {name!r} is a {type(content).__name__}, not axes and a recipe.", fix=_HOW
        )
    return _space(content, name, text)


_HOW = "write axes: {keep: [0.9, 0.8]} and recipe: low-rank{keep=$keep}."


def _space(content: dict[str, Any], name: str, text: str) -> Space:
    single = "families" not in content
    valid = tuple(dict.fromkeys((*_SPACE_KEYS, *(_FAMILY_KEYS if single else ()))))
    _known_keys(f"the space {name!r}", content, valid)
    name = str(content.get("name") or name)
    entries = [{key: value for key, value in content.items() if key in _FAMILY_KEYS}] if single else content["families"]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise SpaceError("SPACE-001", f"families of the space {name!r} is not a list of families.", fix=_HOW)
    families = tuple(_family(name, index, entry) for index, entry in enumerate(entries))
    names = [family.name for family in families]
    twice = sorted({each for each in names if names.count(each) > 1})
    if twice:
        raise SpaceError("SPACE-001", f"the space {name!r} has two families {twice[0]!r}.", fix="name them apart.")
    return Space(name, str(content.get("description") or ""), families, text)


def _family(space: str, index: int, content: dict[str, Any]) -> Family:
    name = str(content.get("name") or (space if index == 0 else f"{space} {index + 1}"))
    where = f"family {name!r} of the space {space!r}"
    _known_keys(where, content, _FAMILY_KEYS)
    axes, patterns = content.get("axes") or {}, content.get("patterns") or {}
    for key, value in (("axes", axes), ("patterns", patterns)):
        if not isinstance(value, dict):
            raise SpaceError("SPACE-001", f"{key} of {where} is {value!r}, not a mapping.", fix=_HOW)
    recipe = content.get("recipe")
    if not isinstance(recipe, str | list):
        raise SpaceError("SPACE-001", f"{where} has no recipe.", fix=_HOW)
    sample, seed = content.get("sample"), content.get("seed", 0)
    for key, number, low in (("sample", sample, 1), ("seed", seed, 0)):
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < low):
            raise SpaceError("SPACE-001", f"{key} of {where} is {number!r}.", fix=f"give a whole number from {low} on.")
    conditions = content.get("where") or []
    conditions = [str(entry) for entry in (conditions if isinstance(conditions, list) else [conditions])]
    family = Family(
        name,
        {str(key): value for key, value in axes.items()},
        recipe,
        {str(key): str(value) for key, value in patterns.items()},
        tuple(conditions),
        sample,
        seed,
    )
    _check_placeholders(where, family)
    return family


def _known_keys(where: str, content: Mapping[str, Any], valid: tuple[str, ...]) -> None:
    for key in content:
        if key not in valid:
            raise SpaceError("SPACE-001", f"{where} has an unknown key {key!r}.", fix=suggest(str(key), valid))


def _check_placeholders(where: str, family: Family) -> None:
    """Every placeholder is an axis or a pattern, and every axis and pattern is used."""
    in_patterns = {name for text in family.patterns.values() for name in _PLACEHOLDER.findall(text)}
    in_recipe = set(_placeholders(family.recipe))
    for used, valid in (
        (in_patterns, tuple(family.axes)),
        (in_recipe, (*family.axes, *family.patterns)),
    ):
        for name in sorted(used - set(valid)):
            raise SpaceError(
                "SPACE-002", f"${name} stands in the recipe, and is no axis.", where=where, fix=suggest(name, valid)
            )
    for name in (*family.axes, *family.patterns):
        if name not in in_patterns | in_recipe:
            raise SpaceError(
                "SPACE-002",
                f"the axis {name!r} changes nothing: ${name} is not in the recipe.",
                where=where,
                fix=f"write ${name} in the recipe, or drop it.",
            )


def _placeholders(recipe: Any) -> Iterator[str]:
    if isinstance(recipe, str):
        yield from _PLACEHOLDER.findall(recipe)
    elif isinstance(recipe, Mapping):
        for key, value in recipe.items():
            yield from _placeholders(key)
            yield from _placeholders(value)
    elif isinstance(recipe, list):
        for entry in recipe:
            yield from _placeholders(entry)


def _filled(recipe: Any, values: Mapping[str, Any], *, bare: bool) -> Any:
    """A recipe with values in place of placeholders; one that stands alone keeps its type, unless the text is `bare`,
    that is, read again as the one-line form."""
    if isinstance(recipe, str):
        alone = _PLACEHOLDER.fullmatch(recipe)
        if alone and not bare:
            return values[alone[1]]
        return _PLACEHOLDER.sub(lambda found: _written(values[found[1]]), recipe)
    if isinstance(recipe, Mapping):
        return {_filled(key, values, bare=bare): _filled(value, values, bare=bare) for key, value in recipe.items()}
    if isinstance(recipe, list):
        # An entry of text is a pass in its one-line form.
        return [_filled(entry, values, bare=isinstance(entry, str) or bare) for entry in recipe]
    return recipe


def _written(value: Any) -> str:
    """A value in the one-line form of recipes. Text goes as it stands: it may be a part of something."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(_written(entry) for entry in value) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _each(text: str, values: Mapping[str, Any]) -> Iterator[str]:
    """The text for each combination of the entries of its placeholders' lists."""
    names = list(dict.fromkeys(_PLACEHOLDER.findall(text)))
    lists = [values[name] if isinstance(values[name], list | tuple) else [values[name]] for name in names]
    for combination in product(*lists):
        chosen = dict(zip(names, combination, strict=True))
        yield _PLACEHOLDER.sub(lambda found, chosen=chosen: _written(chosen[found[1]]), text)  # type: ignore[misc]
