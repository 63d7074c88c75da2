"""What a budget counts, the workload that latency is measured on, and what a matrix costs, dense or factored."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from skink.budget.interpolate import interpolate
from skink.errors import OptionError, check_range
from skink.graph.program import Program

Unit = Literal["params", "bytes", "flops", "latency"]

# Rows of inputs, out, in, rank (None: dense), dtype, device -> seconds of one call. Of pivoted factors, with
# `pivoted=True` besides.
Seconds = Callable[..., float]

# Ranks to measure at, as shares of the rank whose factors hold as many numbers as the weight: out in / (out + in) of
# thin factors, the smaller side of pivoted ones.
_MEASURED = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)


@dataclass(frozen=True)
class Workload:
    """What is asked of a model: its text form is `1x128+64`, batch x prompt + output.

    Args:
        batch: sequences at once, 1 or more.
        prompt: tokens of each prompt, 1 or more; they are read at once.
        output: tokens generated after each, 0 or more; one at a time.

    Raises:
        OptionError: OPTION-002 out of range.
    """

    batch: int = 1
    prompt: int = 128
    output: int = 64

    def __post_init__(self) -> None:
        check_range("workload batch", self.batch, low=1, high=1 << 20)
        check_range("workload prompt", self.prompt, low=1, high=1 << 30)
        check_range("workload output", self.output, low=0, high=1 << 30)

    @classmethod
    def parse(cls, text: str) -> "Workload":
        """The workload that `text` stands for.

        Raises:
            OptionError: OPTION-003 not of the form BATCHxPROMPT+OUTPUT, OPTION-002 out of range.
        """
        match = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*\+\s*(\d+)\s*", text, re.ASCII)
        if match is None:
            raise OptionError(
                "OPTION-003",
                f"workload={text!r} is not of the form BATCHxPROMPT+OUTPUT.",
                fix="write 1x128+64 for one sequence, a prompt of 128 tokens and 64 new ones.",
            )
        batch, prompt, output = map(int, match.groups())
        return cls(batch, prompt, output)

    def __str__(self) -> str:
        return f"{self.batch}x{self.prompt}+{self.output}"


class Pricing(ABC):
    """The cost of matrices [out, in] in one unit; made by `pricing`.

    Everywhere, `pivoted` says that R rows of the product of the factors are stored as they are, which takes R x R
    numbers less, and `uses` how many times each token passes through the weight, which counts where work is counted and
    not where size is.
    """

    @abstractmethod
    def linear(self, out: int, in_: int, *, uses: int = 1) -> float:
        """The cost of the dense matrix."""

    @abstractmethod
    def low_rank_curve(self, out: int, in_: int, ranks: Tensor, *, pivoted: bool = False, uses: int = 1) -> Tensor:
        """The cost of its factors at each of the ranks int64[K], 1 or more: float64[K]."""

    def low_rank(self, out: int, in_: int, rank: int, *, pivoted: bool = False, uses: int = 1) -> float:
        """The cost of its factors at one rank."""
        return float(self.low_rank_curve(out, in_, torch.tensor([rank]), pivoted=pivoted, uses=uses))


@dataclass(frozen=True)
class CountPricing(Pricing):
    """Costs in proportion to the count of numbers.

    Args:
        each: the cost of one number of a weight.
        per_use: whether it is paid once for each use.
    """

    each: float = 1.0
    per_use: bool = False

    def linear(self, out: int, in_: int, *, uses: int = 1) -> float:
        """See `Pricing.linear`."""
        return self._times(uses) * out * in_

    def low_rank_curve(self, out: int, in_: int, ranks: Tensor, *, pivoted: bool = False, uses: int = 1) -> Tensor:
        """See `Pricing.low_rank_curve`."""
        exact = ranks.double()
        saved = exact.square() if pivoted else 0
        return self._times(uses) * (exact * (out + in_) - saved)

    def _times(self, uses: int) -> float:
        return self.each * (uses if self.per_use else 1)


class LatencyPricing(Pricing):
    """Seconds of a workload: the prompt's rows once, and the batch's rows for each new token.

    Only a few ranks of each shape are measured; between them the seconds are interpolated, beyond them continued.

    Args:
        workload: see `Workload`.
        dtype: of weights and inputs.
        device: where to measure.
        seconds: measures one call.
    """

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device, seconds: Seconds) -> None:
        self.workload = workload

        @cache
        def measured(rows: int, out: int, in_: int, rank: int | None, pivoted: bool) -> float:
            return seconds(rows, out, in_, rank, dtype, device, **({"pivoted": True} if pivoted else {}))

        self._measured = measured

    def linear(self, out: int, in_: int, *, uses: int = 1) -> float:
        """See `Pricing.linear`."""
        return uses * self._workload(out, in_, None)

    def low_rank_curve(self, out: int, in_: int, ranks: Tensor, *, pivoted: bool = False, uses: int = 1) -> Tensor:
        """See `Pricing.low_rank_curve`."""
        even = min(out - 1, in_) if pivoted else out * in_ / (out + in_)
        known = sorted({max(1, math.ceil(share * even)) for share in _MEASURED})
        return uses * interpolate(ranks, known, [self._workload(out, in_, rank, pivoted) for rank in known])

    def _workload(self, out: int, in_: int, rank: int | None, pivoted: bool = False) -> float:
        batch, output = self.workload.batch, self.workload.output
        total = self._measured(batch * self.workload.prompt, out, in_, rank, pivoted)
        return total + (output * self._measured(batch, out, in_, rank, pivoted) if output else 0)


def pricing(
    unit: Unit, program: Program, workload: Workload | None = None, *, seconds: Seconds | None = None
) -> Pricing:
    """The prices of matrices of `program`.

    Args:
        unit: `params` counts numbers; `bytes` those in the program's dtype; `flops` multiply-accumulates for each
            generated token; `latency` measured seconds of `workload` on the device of the program's weights.
        program: its dtype and device count, not its size.
        workload: for `latency`; 1x128+64 by default.
        seconds: measures one call, for `latency`; by default `measured_seconds` of the op `low_rank_linear`.
    """
    if unit == "params":
        return CountPricing()
    if unit == "flops":
        return CountPricing(per_use=True)
    if unit == "bytes":
        return CountPricing(each=float(program.dtype.itemsize))
    if seconds is None:
        from skink.kernels.low_rank_linear.break_even import measured_seconds

        seconds = measured_seconds
    return LatencyPricing(workload or Workload(), program.dtype, _device(program), seconds)


def _device(program: Program) -> torch.device:
    return next((tensor.device for _, tensor in program.weights()), torch.device("cpu"))
