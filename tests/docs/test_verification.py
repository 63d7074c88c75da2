"""docs/verification.md lists the rules of every stage as the code has them."""

import re

from skink.graph.legality import NODE_RULES, PROGRAM_RULES
from skink.graph.program import Stage
from tests.docs.pages import page


def _span(stages: tuple[Stage, ...]) -> str:
    if stages == tuple(Stage):
        return "all"
    return str(stages[0]) if len(stages) == 1 else f"{stages[0]} to {stages[-1]}"


def test_the_table_of_rules_is_the_list_of_rules() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| ([a-z ]+) \|$", page("docs/verification.md").text, flags=re.MULTILINE)
    assert rows == [(rule.name, _span(rule.stages)) for rule in (*NODE_RULES, *PROGRAM_RULES)]
