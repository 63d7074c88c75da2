"""Recipes: passes in order, as YAML, as one line of text, or as Python objects.

description: what it is for                         low-rank{keep=0.8,method=whitened}, other-pass
passes:
  - low-rank: {keep: 0.8}
compare:
  - low-rank{keep=0.8,method=plain}
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from skink.errors import OptionError, RecipeError, suggest
from skink.graph.passes import Pass
from skink.passes import find_pass

_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Recipe:
    """Passes in order.

    Args:
        passes: without `canonicalize`, which always runs first.
        description: one line.
        compare: other pass lists, as text, whose perplexity the report shows beside this recipe's.
    """

    passes: tuple[Pass, ...]
    description: str = ""
    compare: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The one-line form; an empty recipe is empty."""
        return ", ".join(str(entry) for entry in self.passes)

    def describe(self) -> str:
        """The one-line form with every option that is set, defaults too."""
        return ", ".join(entry.describe() for entry in self.passes)

    @property
    def everything(self) -> tuple[Pass, ...]:
        """Its own passes, and those of what it is compared with."""
        return (*self.passes, *(entry for text in self.compare for entry in parse_passes(text)))

    def to_yaml(self) -> str:
        """The recipe with every option written out, as it is saved with a result."""
        content: dict[str, Any] = {"description": self.description} if self.description else {}
        content["passes"] = [
            {entry.name: {key: list(v) if isinstance(v, tuple) else v for key, v in entry.resolved().options().items()}}
            for entry in self.passes
        ]
        if self.compare:
            content["compare"] = list(self.compare)
        return yaml.safe_dump(content, sort_keys=False)


def shipped_recipes() -> dict[str, str]:
    """Names of the recipes that ship → their YAML."""
    folder = files("skink") / "recipes"
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


def load_recipe(
    recipe: "str | Path | Sequence[Pass | str] | Recipe", overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """A recipe from whatever the user has.

    Args:
        recipe: a YAML file, the name of a recipe that ships, the one-line form, a sequence of passes (objects or
            one-line text), or a recipe.
        overrides: `{"low-rank.keep": 0.7}`, options to change wherever that pass stands.

    Raises:
        RecipeError: RECIPE-001 unknown pass, -002 unreadable, -004 a pass whose package cannot be imported.
        OptionError: OPTION-001 ... -003.
    """
    loaded = _load(recipe)
    for key, value in (overrides or {}).items():
        loaded = _override(loaded, key, value)
    return loaded


def _load(recipe: "str | Path | Sequence[Pass | str] | Recipe") -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Path) or (isinstance(recipe, str) and recipe.endswith(_SUFFIXES)):
        path = Path(recipe)
        try:
            return _from_yaml(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                "RECIPE-002",
                f"the recipe {str(path)!r} cannot be read.",
                why=str(error),
                fix=f"give a YAML file, or one of the recipes that ship: {', '.join(shipped_recipes())}.",
            ) from error
    if isinstance(recipe, str):
        shipped = shipped_recipes()
        if recipe in shipped:
            return _from_yaml(shipped[recipe], recipe)
        return Recipe(parse_passes(recipe, shipped=tuple(shipped)))
    passes: list[Pass] = []
    for entry in recipe:
        if not isinstance(entry, Pass | str):
            raise RecipeError(
                "RECIPE-002",
                f"an entry of the recipe is a {type(entry).__name__}, neither a pass nor text.",
                fix='write Canonicalize() or "canonicalize".',
            )
        passes.extend([entry] if isinstance(entry, Pass) else parse_passes(entry))
    return Recipe(tuple(passes))


def _from_yaml(text: str, name: str) -> Recipe:
    try:
        content = yaml.safe_load(text)
    # Dates and numbers that there are none of are ValueErrors.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError("RECIPE-002", f"the recipe {name!r} is not YAML.", why=str(error)) from error
    if content is None:
        return Recipe(())
    if isinstance(content, list):
        content = {"passes": content}
    if not isinstance(content, dict):
        raise RecipeError("RECIPE-002", f"the recipe {name!r} is a {type(content).__name__}, not a list of passes.")
    valid = ["description", "passes", "compare"]
    for key in content:
        if key not in valid:
            raise RecipeError(
                "RECIPE-002", f"the recipe {name!r} has an unknown key {key!r}.", fix=suggest(str(key), valid)
            )
    for key in ("passes", "compare"):
        if not isinstance(content.get(key) or [], list):
            raise RecipeError(
                "RECIPE-002",
                f"{key} of the recipe {name!r} is {content[key]!r}, not a list.",
                fix="begin lines with -.",
            )
    passes: list[Pass] = []
    for entry in content.get("passes") or []:
        if isinstance(entry, str):
            passes.extend(parse_passes(entry))
        elif isinstance(entry, dict) and len(entry) == 1 and isinstance(next(iter(entry.values())), dict | None):
            ((pass_name, options),) = entry.items()
            passes.append(find_pass(str(pass_name)).from_options(options or {}))
        else:
            raise RecipeError(
                "RECIPE-002",
                f"an entry of the recipe {name!r} is {entry!r}.",
                fix="write `- low-rank: {keep: 0.8}` or `- low-rank`.",
            )
    return Recipe(
        tuple(passes), str(content.get("description") or ""), tuple(str(e) for e in content.get("compare") or ())
    )


def parse_passes(text: str, *, shipped: Sequence[str] = ()) -> tuple[Pass, ...]:
    """Passes from the one-line form: `name{key=value,key=[a,b]}, name`.

    Raises:
        RecipeError: RECIPE-001, RECIPE-002, RECIPE-004.
    """
    passes = []
    for part in _split(text):
        name, brace, rest = part.partition("{")
        if brace and not rest.endswith("}"):
            raise RecipeError("RECIPE-002", f"{part!r} lacks its closing brace.", fix="write low-rank{keep=0.8}.")
        try:
            found = find_pass(name.strip())
        except RecipeError as error:
            if shipped and error.code == "RECIPE-001":
                error.fix += f" recipes that ship: {', '.join(shipped)}; or a .yaml file."
            raise
        passes.append(found.from_options(_parse_options(rest.removesuffix("}"), part)))
    return tuple(passes)


def _parse_options(text: str, part: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for entry in _split(text):
        key, equals, value = entry.partition("=")
        if not equals:
            raise RecipeError("RECIPE-002", f"{entry!r} in {part!r} is not key=value.", fix="write low-rank{keep=0.8}.")
        try:
            options[key.strip()] = parse_value(value)
        except RecursionError as error:
            raise RecipeError("RECIPE-002", f"the value of {key.strip()!r} is nested too deeply.") from error
    return options


def parse_value(text: str) -> Any:
    """An option's value from text.

    `[a,b]` is a list, numbers and true/false/null are read as in YAML, `"..."` is text with JSON's escapes, and the
    rest is text as it stands.
    """
    text = text.strip()
    if text.startswith('"'):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise RecipeError("RECIPE-002", f"{text} is not text in quotes.", why=str(error)) from error
    if text.startswith("[") and text.endswith("]"):
        return [parse_value(entry) for entry in _split(text[1:-1])]
    if text.startswith(("*", "&", "!", "{", "%", "@", "`")):
        return text
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    return value if isinstance(value, bool | int | float | None) else text


def _split(text: str) -> list[str]:
    """Parts between commas that stand outside braces, brackets and quotes."""
    parts, depth, begin = [], 0, 0
    quoted = escaped = False
    for index, character in enumerate(text):
        if character == '"' and not escaped:
            quoted = not quoted
        escaped = character == "\\" and not escaped
        if quoted:
            continue
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(text[begin:index])
            begin = index + 1
    parts.append(text[begin:])
    return [part.strip() for part in parts if part.strip()]


def _override(recipe: Recipe, key: str, value: Any) -> Recipe:
    name, dot, option = key.rpartition(".")
    names = [entry.name for entry in recipe.passes]
    if not dot or name not in names:
        raise OptionError(
            "OPTION-001",
            f"{key!r} names no pass of this recipe.",
            fix="write pass.option=value; " + suggest(name, names),
        )
    passes = tuple(_with_option(entry, name, option, value) for entry in recipe.passes)
    before = {entry.name: entry.options().get(option) for entry in recipe.passes}

    # What is compared differs from the recipe in what it says, and in nothing else: an option that was the same there
    # stays the same.
    def changed(entry: Pass) -> Pass:
        same = entry.name == name and entry.options().get(option) == before[name]
        return _with_option(entry, name, option, value) if same else entry

    compare = tuple(", ".join(str(changed(entry)) for entry in parse_passes(text)) for text in recipe.compare)
    return replace(recipe, passes=passes, compare=compare)


def _with_option(entry: Pass, name: str, option: str, value: Any) -> Pass:
    return type(entry).from_options({**entry.options(), option: value}) if entry.name == name else entry
