"""What was said of training, and whether any pass of a recipe makes use of it."""

from collections.abc import Sequence

from skink.errors import RecoveryError
from skink.graph.passes import Pass


def check_asked(
    passes: Sequence[Pass], *, text: bool = False, cut: bool = False, checkpoints: bool = False, teacher: bool = False
) -> None:
    """Refuse what is said of training where no pass trains, and a teacher that nobody learns from.

    Args:
        passes: all that will run.
        text: whether text to train on was named.
        cut: whether it was said how to read or cut it.
        checkpoints: whether a folder was named for them.
        teacher: whether one was named.

    Raises:
        RecoveryError: RECOVER-009.
    """
    if not any(entry.training_tokens(2) for entry in passes):
        for given, what, option in (
            (text, "text to train on was named", "--training"),
            (
                cut,
                "it was said how text to train on is read",
                "--training-length, --training-packing, --training-field and --training-dtype",
            ),
            (checkpoints, "a folder for checkpoints was named", "--checkpoints"),
        ):
            if given:
                raise RecoveryError(
                    "RECOVER-009",
                    f"{what}, and no pass of the recipe trains.",
                    fix=f"add a pass that does, such as recover{{train=new}}, or leave {option} out.",
                )
    if teacher and not any(entry.needs_original for entry in passes):
        raise RecoveryError(
            "RECOVER-009",
            "a teacher was named, and no pass of the recipe learns from one.",
            fix="add recover{kl=1} or another loss against a teacher, or leave --teacher out.",
        )
