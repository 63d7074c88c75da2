"""Which values of a program have rows for each text and none for each token, as what a pooler reads has."""

from collections.abc import Iterable
from typing import Any

import sympy
from torch import fx

from skink.graph.program import Program
from skink.graph.token_axis import product, size_of


def rows_per_text(program: Program, node: fx.Node) -> int | None:
    """How many rows of a value [..., n] each text gives; None where that depends on how many tokens it has.

    Args:
        program: with sizes in view, whose first input is the tokens [B, T], or has more than one size that varies.
        node: one of its nodes.
    """
    batch, *others = next(iter(program.graph.find_nodes(op="placeholder"))).meta["val"].shape
    tokens = _symbols(others)
    leading = node.meta["val"].shape[:-1]
    if not tokens or _symbols(leading) & tokens:
        return None
    return int(product(leading).subs(dict.fromkeys(_symbols([batch]), 1)))


def _symbols(sizes: Iterable[Any]) -> set[sympy.Basic]:
    return {symbol for size in sizes for symbol in size_of(size).free_symbols}
