"""The list of raising rules."""

from skink.passes.canonicalize.raise_rules import RULES, SECOND_RULES


def test_rules_have_names_of_their_own_and_are_exact() -> None:
    rules = (*RULES, *SECOND_RULES)
    assert len({rule.name for rule in rules}) == len(rules) > 20
    assert {rule.exactness for rule in rules} == {"exact"}
