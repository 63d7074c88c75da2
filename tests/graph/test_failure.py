"""Failures: what makes two of them the same."""

from skink.errors import OptionError
from skink.graph.failure import Failure


def test_failures_are_the_same_by_kind_code_and_pass() -> None:
    one = Failure("VerifyError", "VERIFY-001", "scale", "text")
    assert one.same(Failure("VerifyError", "VERIFY-001", "scale", "other text"))
    assert not one.same(None)
    for other in (
        Failure("VerifyError", "VERIFY-002", "scale", "text"),
        Failure("VerifyError", "VERIFY-001", "other", "text"),
        Failure("GraphError", "VERIFY-001", "scale", "text"),
    ):
        assert not one.same(other)
    assert Failure.of(ZeroDivisionError("a\nb"), "p") == Failure("ZeroDivisionError", "", "p", "ZeroDivisionError: a")
    assert Failure.of(OptionError("OPTION-002", "no."), "p") == Failure(
        "OptionError", "OPTION-002", "p", "[OPTION-002] no."
    )
