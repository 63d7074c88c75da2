"""The learning rate of a step, from the step's number alone, so that a run that is resumed needs no state for it."""

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate(step: int, steps: int, *, peak: float, schedule: Schedule, warmup: float, final: float) -> float:
    """The learning rate of one step: a straight rise to `peak`, then a way down to `final` of it.

    Sources: Goyal et al. 2017, arXiv 1706.02677, section 2.2 (gradual warm-up); Loshchilov and Hutter 2017,
    arXiv 1608.03983, equation 5 (cosine, without restarts).

    Args:
        step: the step that is about to be made, 0 to steps - 1.
        steps: steps of the whole run.
        peak: the highest rate; the first step after the rise has it.
        schedule: the way down. `constant` stays at the peak, whatever `final` is.
        warmup: share of the steps that the rise takes, 0 to 1. No step has rate 0.
        final: the share of the peak that the last step has, 0 to 1.
    """
    rise = math.ceil(warmup * steps)
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    # 0 at the first step after the rise, 1 at the last.
    way = (step - rise) / max(1, steps - 1 - rise)
    if schedule == "constant":
        return peak
    left = (1 + math.cos(math.pi * way)) / 2 if schedule == "cosine" else 1 - way
    return peak * (final + (1 - final) * left)
