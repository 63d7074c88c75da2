"""What a run knows of itself beside its weights: plain data, which a checkpoint holds and a record is made from."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

# Micikevicius et al. 2018, arXiv 1710.03740, section 3.2 and its dynamic form: halve on overflow, double after many
# steps without one.
_FIRST_SCALE = 2.0**16
_CLEAN_STEPS = 2000


@dataclass
class LossScale:
    """The factor on the loss that keeps gradients within the range of float16.

    Args:
        value: the factor, a power of two.
        clean: steps in a row without overflow.
    """

    value: float = _FIRST_SCALE
    clean: int = 0

    def update(self, finite: bool) -> None:
        """After a step whose gradients were finite, or were not."""
        self.clean = self.clean + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.clean == _CLEAN_STEPS:
            self.value, self.clean = self.value * 2, 0


@dataclass
class RunState:
    """How far a run has come, and what it saw.

    Args:
        step: steps made.
        tokens: tokens read.
        seconds: taken so far.
        losses: (tokens read, loss) of each step.
        terms: each term's value at each step.
        held_out: (tokens read, loss) of each evaluation.
        best: the evaluation with the least loss.
        without_better: evaluations since then.
        stopped: whether patience ran out.
        scale: of float16.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=dict)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best: tuple[int, float] | None = None
    without_better: int = 0
    stopped: bool = False
    scale: LossScale = field(default_factory=LossScale)

    def evaluated(self, loss: float, patience: int) -> bool:
        """Note a held-out loss, a finite number; whether it is the best so far."""
        self.held_out.append((self.tokens, loss))
        better = self.best is None or loss < self.best[1]
        if better:
            self.best, self.without_better = (self.tokens, loss), 0
        else:
            self.without_better += 1
            self.stopped = bool(patience) and self.without_better >= patience
        return better

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RunState":
        """What `as_dict` gave, after JSON made lists of its tuples."""
        pairs = {name: [(int(tokens), loss) for tokens, loss in data[name]] for name in ("losses", "held_out")}
        best = None if data["best"] is None else (int(data["best"][0]), data["best"][1])
        return cls(**{**data, **pairs, "best": best, "scale": LossScale(**data["scale"])})
