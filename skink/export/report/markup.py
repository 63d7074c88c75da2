"""HTML and SVG built from calls, so that nothing reaches the page unescaped.

The result is well-formed XML as well as HTML, which the tests rely on.
"""

from collections.abc import Iterable
from html import escape

from skink.export.report import formatting as fmt

# HTML elements that have no closing tag.
_VOID = frozenset({"meta", "br", "hr", "col", "input"})


class Markup(str):
    """Text that is markup already. Only this module makes it from strings."""

    __slots__ = ()


Child = str | None | Iterable["Child"]


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Markup:
    """The element `name`. Children that are not Markup are escaped, None is left out, and iterables are joined.

    Attributes: an underscore stands for a hyphen, one at the end is dropped (`class_`), None leaves the attribute out,
    and floats are rounded to two decimals.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(fmt.clean(_value(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written} />")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    """The children one after another, escaped where they are not Markup."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(escape(fmt.clean(child)))
        elif child is not None:
            parts.append(join(*child))
    return Markup("".join(parts))


def document(*, title: str, style: str, body: Child) -> str:
    """A whole page that loads nothing and runs nothing, which its own security policy enforces.

    Args:
        title: shown by the browser.
        style: CSS of this package, trusted: it must hold neither "<" nor "&".
        body: the content.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2f}".rstrip("0").rstrip(".")
