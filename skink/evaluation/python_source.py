"""Python source as a tree, where a text is Python."""

import ast
import warnings


def parsed(text: str) -> ast.Module | None:
    """The tree of a text; None where it is not Python, or nests too deeply. Warnings about old source are not told."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes, which are errors where warnings are
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
