"""`skink passes`: what recipes are made of."""

import dataclasses
import re
import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from skink.cli.arguments import AsJson
from skink.cli.console import Session, session_of

if TYPE_CHECKING:
    from skink.graph.passes import Pass


def passes(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this pass.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List the passes that recipes are made of, with their options, and the recipes that ship."""
    from skink.passes import discover, find_pass
    from skink.passes.recipe import load_recipe, shipped_recipes

    session = session_of(context)
    found = discover()
    chosen = [find_pass(name)] if name else list(found.passes.values())
    described = [_described(entry, found.packages.get(entry.name, "")) for entry in chosen]
    broken = [dataclasses.asdict(entry) for entry in found.broken] if not name else []
    recipes = {recipe: load_recipe(recipe) for recipe in shipped_recipes()} if not name else {}
    if session.as_json:
        listed = {key: {"description": r.description, "passes": str(r)} for key, r in recipes.items()}
        session.emit({"passes": described, **({"broken": broken, "recipes": listed} if not name else {})})
        return
    for entry in described:
        _show(session, entry)
    for entry in broken:
        title = Text.assemble((entry["name"], "bold red"), f"  cannot be imported from the package {entry['package']}")
        session.show(title, Text(f"  {entry['reason']}", style="dim"), "")
    if recipes:
        session.show(Text("Recipes that ship (skink compress MODEL --recipe NAME)", style="bold"))
        for key, recipe in recipes.items():
            session.show(Padding(Text.assemble((key, "bold cyan"), f"  {recipe.description}"), (0, 0, 0, 2)))


def _described(entry: "type[Pass]", package: str) -> dict[str, Any]:
    hints = typing.get_type_hints(entry)
    texts = argument_texts(entry.__doc__ or "")
    return {
        "name": entry.name,
        "summary": entry.summary,
        "package": package or "skink",
        "exactness": entry.exactness,
        "requires": str(entry.requires),
        "yields": str(entry.yields) if entry.yields is not None else None,
        "options": [
            {
                "name": option.name,
                "type": type_name(hints[option.name]),
                "default": None if option.default is dataclasses.MISSING else option.default,
                "help": texts.get(option.name, ""),
            }
            for option in dataclasses.fields(entry)
        ],
    }


def type_name(hint: Any) -> str:
    """A type as users write its values: `whitened|plain`, `list of str`, `float`."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "|".join(str(argument) for argument in arguments)
    if typing.get_origin(hint) is tuple:
        return f"list of {type_name(arguments[0])}"
    if arguments:
        return " or ".join("none" if argument is type(None) else type_name(argument) for argument in arguments)
    return str(hint.__name__)


def argument_texts(docstring: str) -> dict[str, str]:
    """What the section `Args:` of a docstring says about each name."""
    _, _, section = docstring.partition("Args:\n")
    found: dict[str, str] = {}
    current, depth = "", None
    for line in section.splitlines():
        if not line.strip():
            break
        indent = len(line) - len(line.lstrip())
        depth = indent if depth is None else depth
        if indent < depth:
            break
        start = re.match(r"(\w+): (.*)", line.strip())
        if indent == depth and start:
            current = start[1]
            found[current] = start[2]
        elif current:
            found[current] += " " + line.strip()
    return found


def _show(session: Session, entry: dict[str, Any]) -> None:
    title = Text(entry["name"], style="bold cyan")
    title.append(f"  {entry['summary']}", style="not bold default")
    stages = f"takes {entry['requires']}"
    if entry["yields"]:
        stages += f", leaves {entry['yields']}"
    origin = "" if entry["package"] == "skink" else f"; from the package {entry['package']}"
    session.show(title, Text(f"  {entry['exactness']}; {stages}{origin}", style="dim"))
    if entry["options"]:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for column in ("option", "type", "default", ""):
            table.add_column(column, no_wrap=column in ("option", "default"))
        for option in entry["options"]:
            table.add_row(
                option["name"], Text(option["type"]), Text(_default_text(option["default"])), Text(option["help"])
            )
        session.show(Padding(table, (0, 0, 0, 2)))
    session.show("")


def _default_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(str(entry) for entry in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
