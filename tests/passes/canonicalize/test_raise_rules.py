"""The list of raising rules."""

from skink.passes.canonicalize.raise_rules import RULES


def test_rules_have_names_of_their_own_and_are_exact() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES) > 20
    assert {rule.exactness for rule in RULES} == {"exact"}
