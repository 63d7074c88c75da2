"""What a budget counts, the workload that latency is measured on, and what a matrix costs, dense or factored."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from skink.errors import OptionError, check_range
from skink.graph.program import Program

Unit = Literal["params", "bytes", "flops", "latency"]
UNITS: tuple[str, ...] = get_args(Unit)

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


class Pricing(Protocol):
    """The cost of matrices [out, in] in one unit; made by `pricing`.

    Everywhere, `core` says that an R x R matrix stands between the two factors, `pivoted` that R rows of the product
    are stored as they are, which takes R x R numbers less, and `uses` how many times each token passes through the
    weight, which counts where work is counted and not where size is.
    """

    def linear(self, out: int, in_: int, *, uses: int = 1) -> float:
        """The cost of the dense matrix."""

    def low_rank(
        self, out: int, in_: int, rank: int, *, core: bool = False, pivoted: bool = False, uses: int = 1
    ) -> float:
        """The cost of its factors at `rank`, 1 or more."""

    def low_rank_curve(
        self, out: int, in_: int, ranks: Tensor, *, core: bool = False, pivoted: bool = False, uses: int = 1
    ) -> Tensor:
        """The cost at each of the ranks int64[K]: float64[K]."""


@dataclass(frozen=True)
class CountPricing:
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

    def low_rank(
        self, out: int, in_: int, rank: int, *, core: bool = False, pivoted: bool = False, uses: int = 1
    ) -> float:
        """See `Pricing.low_rank`."""
        return float(self.low_rank_curve(out, in_, torch.tensor([rank]), core=core, pivoted=pivoted, uses=uses))

    def low_rank_curve(
        self, out: int, in_: int, ranks: Tensor, *, core: bool = False, pivoted: bool = False, uses: int = 1
    ) -> Tensor:
        """See `Pricing.low_rank_curve`."""
        exact = ranks.double()
        square = exact.square() * (int(core) - int(pivoted))
        return self._times(uses) * (exact * (out + in_) + square)

    def _times(self, uses: int) -> float:
        return self.each * (uses if self.per_use else 1)


class LatencyPricing:
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

    def low_rank(
        self, out: int, in_: int, rank: int, *, core: bool = False, pivoted: bool = False, uses: int = 1
    ) -> float:
        """See `Pricing.low_rank`."""
        return float(self.low_rank_curve(out, in_, torch.tensor([rank]), core=core, pivoted=pivoted, uses=uses))

    def low_rank_curve(
        self, out: int, in_: int, ranks: Tensor, *, core: bool = False, pivoted: bool = False, uses: int = 1
    ) -> Tensor:
        """See `Pricing.low_rank_curve`; a core is priced as one more square matrix."""
        even = min(out - 1, in_) if pivoted else out * in_ / (out + in_)
        known = sorted({max(1, math.ceil(share * even)) for share in _MEASURED})
        seconds = [
            self._workload(out, in_, rank, pivoted) + (self._workload(rank, rank, None) if core else 0)
            for rank in known
        ]
        return uses * _interpolated(ranks.double(), known, seconds)

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


def _interpolated(at: Tensor, known: list[int], values: list[float]) -> Tensor:
    """The piecewise linear function through (known, values); its end pieces go on, and never below 0."""
    x, y = torch.tensor(known, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    if len(x) == 1:
        return y.expand(at.shape).clone()
    left = (torch.searchsorted(x, at, right=True) - 1).clamp(0, len(x) - 2)
    slope = (y[left + 1] - y[left]) / (x[left + 1] - x[left])
    return (y[left] + slope * (at - x[left])).clamp(min=0)
