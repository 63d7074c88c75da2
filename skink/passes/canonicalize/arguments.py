"""Arguments of calls by name."""

from typing import Any

from torch import fx


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator's call, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    bound = {argument.name: argument.default_value for argument in schema}
    bound.update(zip((argument.name for argument in schema), node.args, strict=False))
    return bound | dict(node.kwargs)
