"""RECOVER-003: what to say where a loss or a gradient is not finite, with the cause where one can be found."""

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from skink.errors import RecoveryError
from skink.training.loop.options import TrainOptions


@runtime_checkable
class Taught(Protocol):
    """A module that learns from another one, which it does not show as a part of itself."""

    def own_weights(self) -> Iterable[tuple[str, Tensor]]:
        """Those of the module, under the names that a user knows them by."""

    def teacher_fault(self, inputs: Mapping[str, Tensor]) -> str:
        """What of the teacher is not finite for these inputs, a sentence; empty where all is."""


def damaged(weights: Iterable[tuple[str, Tensor]], whose: str = "the") -> str:
    """Which of some weights is the first that is not finite, as a cause for `breakdown`; empty where all are finite.

    Args:
        weights: by name.
        whose: the words before `weight`.
    """
    name = next((name for name, tensor in weights if not is_finite(tensor)), None)
    return f"{whose} weight {name!r} was not finite before the first step." if name is not None else ""


def input_fault(inputs: Mapping[str, Tensor], taught: Taught | None) -> str:
    """What a batch has that no training can cause, as a cause for `breakdown`; empty where there is no such thing.

    Args:
        inputs: of the module, by name.
        taught: the module, where it has a teacher.
    """
    # Infinite ones may be a mask.
    name = next((name for name, tensor in inputs.items() if bool(tensor.isnan().any())), None)
    if name is not None:
        return f"the input {name!r} holds NaN."
    return taught.teacher_fault(inputs) if taught is not None else ""


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds finite numbers only."""
    # Of NaN both ends are NaN. Ten times as quick as asking each number, which counts where a large model is looked at.
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


def breakdown(
    what: str,
    options: TrainOptions,
    rate: float,
    *,
    of: str = "training",
    at: str = "",
    tokens: int = 0,
    cause: str = "",
) -> RecoveryError:
    """The error to raise.

    Args:
        what: is not finite: `its loss is nan`.
        options: of the training.
        rate: the learning rate.
        of: what trains.
        at: in which step; empty before the first was made.
        tokens: read by then; 0: not said.
        cause: what is known to be the cause, a sentence; empty where nothing is.
    """
    low = "" if options.precision == "float32" else f"precision=float32 instead of {options.precision}"
    found = f"{of} broke down {at}: {what}." if at else f"{of} cannot begin: {what}."
    if cause:
        return RecoveryError(
            "RECOVER-003", found, why=cause, fix="begin with a model, a teacher and text whose numbers are finite."
        )
    if not at:
        return RecoveryError(
            "RECOVER-003",
            found,
            why="no step was made yet, and all weights are finite: values within the model overflow, or have no slope.",
            fix=f"{f'try {low}; ' if low else ''}see what the model gives for this text as it is.",
        )
    return RecoveryError(
        "RECOVER-003",
        found,
        why=f"the learning rate was {rate:.3g}{f', after {tokens:,} tokens' if tokens else ''}.",
        fix=f"try a lower learning_rate than {options.learning_rate:g}, a longer warmup{f', {low}' if low else ''}.",
    )
