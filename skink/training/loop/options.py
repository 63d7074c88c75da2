"""How long and how a model trains, and the record of it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from skink.errors import OptionError, check_range
from skink.training.loop.processes import Sharding
from skink.training.loop.schedule import Schedule

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class TrainOptions:
    """How `train` trains.

    Args:
        tokens: tokens of text to read, up to the window in which they end, from 1 on; None with `steps`: so many
            steps; None without: all text once.
        steps: steps to make, from 1 on; not with `tokens`.
        batch: windows of a step, over all processes, from 1 on. The last step may have fewer.
        micro_batch: most windows at once in a process, which decides about memory and changes numbers by rounding
            only; 0: the process's share of the batch.
        learning_rate: the highest, > 0.
        schedule: the way down from it; see `skink.training.loop.schedule`.
        warmup: share of the steps in which the rate rises, 0 to 1.
        final: share of the rate that the last step has, 0 to 1.
        weight_decay: decoupled (AdamW), per unit of learning rate, >= 0; on matrices, not on norms and biases.
        beta1, beta2: of Adam, in [0, 1).
        epsilon: of Adam, > 0.
        clip: largest norm of the gradient of a step, over all parameters, > 0; 0: none.
        precision: in which matrix products run (autocast); float16 scales the loss. Weights that train are float32.
        evaluate_every: tokens between evaluations on held-out text, beside those before the first step and after the
            last; the best weights that were evaluated stay. 0: held-out text is not read, the last weights stay.
        patience: evaluations in a row without a better held-out loss after which training ends; 0: it never gives up.
        checkpoint_every: tokens between checkpoints, where there is a folder for them, from 1 on.
        seed: of the order of windows and of dropout, 0 to 2^32 - 1.
        sharding: `full` spreads weights, gradients and optimizer state over the processes (FSDP2).
    """

    tokens: int | None = None
    steps: int | None = None
    batch: int = 8
    micro_batch: int = 0
    learning_rate: float = 1e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    final: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip: float = 1.0
    precision: Precision = "float32"
    evaluate_every: int = 0
    patience: int = 0
    checkpoint_every: int = 200_000
    seed: int = 0
    sharding: Sharding = "none"

    def __post_init__(self) -> None:
        """Raises OPTION-002 where a value is out of its range."""
        endless = float("inf")
        if self.tokens is not None and self.steps is not None:
            raise OptionError(
                "OPTION-002", f"tokens={self.tokens} and steps={self.steps} both say how long.", fix="give one of them."
            )
        for name in ("tokens", "steps", "batch", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None:
                check_range(name, value, low=1, high=endless, open_high=True)
        for name in ("micro_batch", "evaluate_every", "patience", "weight_decay", "clip"):
            check_range(name, getattr(self, name), low=0, high=endless, open_high=True)
        for name in ("learning_rate", "epsilon"):
            check_range(name, getattr(self, name), low=0, high=endless, open_low=True, open_high=True)
        for name in ("warmup", "final"):
            check_range(name, getattr(self, name), low=0, high=1)
        for name in ("beta1", "beta2"):
            check_range(name, getattr(self, name), low=0, high=1, open_high=True)
        check_range("seed", self.seed, low=0, high=2**32 - 1)

    def as_dict(self) -> dict[str, Any]:
        """All options by name, as JSON can hold them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class TrainingRecord:
    """What a run of `train` did. Equal runs have equal records, but for `seconds`, `resumed_at` and `notes`.

    Args:
        steps: steps made.
        tokens: tokens of text read, padding excluded.
        seconds: of all processes' common time, those before a resume included.
        losses: (tokens read, mean loss of the step per counted token) after each step.
        terms: each term's mean per counted token and step, by its name, unweighted, in the order of `losses`.
        held_out: (tokens read, mean held-out loss per counted token) at each evaluation.
        best: (tokens read, held-out loss) of the weights that stayed; None where none were evaluated.
        stopped_early: whether patience ran out.
        resumed_at: steps that the checkpoint had which the run went on from; None where it began anew.
        processes: how many trained together.
        options: as given.
        notes: what the user should know, as of a checkpoint that could not be read.
    """

    steps: int
    tokens: int
    seconds: float
    losses: tuple[tuple[int, float], ...] = ()
    terms: dict[str, tuple[float, ...]] = field(default_factory=dict)
    held_out: tuple[tuple[int, float], ...] = ()
    best: tuple[int, float] | None = None
    stopped_early: bool = False
    resumed_at: int | None = None
    processes: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON can hold it."""
        return dataclasses.asdict(self)
