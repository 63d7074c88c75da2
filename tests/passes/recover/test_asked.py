"""What is said of training is used, or refused."""

import pytest

from skink.errors import RecoveryError
from skink.passes.recipe import parse_passes
from skink.passes.recover.asked import check_asked


@pytest.mark.parametrize("said", ["text", "cut", "checkpoints", "teacher"])
def test_what_no_pass_makes_use_of_is_refused(said: str) -> None:
    with pytest.raises(RecoveryError, match=r"\[RECOVER-009\] .*, and no pass of the recipe (trains|learns)"):
        check_asked(parse_passes("low-rank"), **{said: True})
    check_asked(parse_passes("low-rank"))
    check_asked(parse_passes("low-rank, recover"), **{said: True})


def test_a_pass_that_trains_on_text_alone_needs_no_teacher() -> None:
    with pytest.raises(RecoveryError, match=r"\[RECOVER-009\] a teacher was named"):
        check_asked(parse_passes("recover{ce=1}"), teacher=True)
    check_asked(parse_passes("recover{ce=1}"), text=True, cut=True, checkpoints=True)
