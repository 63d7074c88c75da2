"""Workloads, and what matrices cost in each unit."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from skink.budget import Workload, pricing
from skink.budget.target import LatencyPricing
from skink.errors import OptionError
from skink.graph.capture import capture
from skink.graph.program import Program

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def half() -> Program:
    """A program whose weights take two bytes each."""
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(6, 4)).half()
    return capture(model, (torch.zeros(1, 6, dtype=torch.half),))


def test_a_workload_is_text_and_back() -> None:
    assert Workload.parse(" 2 x 64 + 0") == Workload(2, 64, 0)
    assert str(Workload()) == "1x128+64"
    assert Workload.parse(str(Workload(3, 5, 7))) == Workload(3, 5, 7)


@pytest.mark.parametrize("text", ["", "128+64", "1x128", "1x128+64+2", "ax1+1", "1.5x2+3", "-1x2+3", "1*2+3"])
def test_text_that_is_no_workload(text: str) -> None:
    with pytest.raises(OptionError, match=r"OPTION-003.*BATCHxPROMPT"):
        Workload.parse(text)


@pytest.mark.parametrize(("text", "name"), [("0x1+1", "batch"), ("1x0+1", "prompt"), ("1x1+9999999999", "output")])
def test_a_workload_out_of_range(text: str, name: str) -> None:
    with pytest.raises(OptionError, match=rf"OPTION-002.*workload {name}"):
        Workload.parse(text)


@pytest.mark.parametrize(
    ("unit", "dense", "factored"), [("params", 24.0, 30.0), ("bytes", 48.0, 60.0), ("flops", 48.0, 60.0)]
)
def test_counted_units(half: Program, unit: str, dense: float, factored: float) -> None:
    prices = pricing(unit, half)  # type: ignore[arg-type]
    # Rank 3 of 4 x 6; each token passes twice, which only work counts.
    assert prices.linear(4, 6, uses=2) == dense
    assert prices.low_rank(4, 6, 3, uses=2) == factored
    curve = prices.low_rank_curve(4, 6, torch.tensor([1, 3]), uses=2)
    assert curve.dtype == torch.float64
    assert curve.tolist() == [prices.low_rank(4, 6, rank, uses=2) for rank in (1, 3)]


def test_pivots_take_a_square_less(half: Program) -> None:
    assert pricing("params", half).low_rank(4, 6, 3, pivoted=True) == 3 * 10 - 9
    # At full rank there is nothing to make of others: as many numbers as the matrix.
    assert pricing("bytes", half).low_rank(4, 6, 4, pivoted=True) == pricing("bytes", half).linear(4, 6)


def test_latency_of_pivots_is_measured_in_their_own_form() -> None:
    ranks = []

    def seconds(*call: object, pivoted: bool = False) -> float:
        rank = call[3]
        assert isinstance(rank, int)
        ranks.append((rank, pivoted))
        return 5.0 + rank * (2 if pivoted else 1)

    prices = LatencyPricing(Workload(1, 1, 0), torch.float32, CPU, seconds)
    found = prices.low_rank_curve(128, 160, torch.tensor([3, 64, 127]), pivoted=True)
    assert found.tolist() == [11.0, 133.0, 259.0]
    # Up to the last rank that leaves an output to make of the others.
    assert sorted(ranks) == [(rank, True) for rank in (4, 8, 16, 32, 64, 96, 127)]
    assert prices.low_rank(128, 160, 64) == 69.0
    assert prices.low_rank(64, 16, 16, pivoted=True, uses=2) == 74.0


def test_latency_is_the_prompt_once_and_a_step_for_each_token(half: Program) -> None:
    calls = []

    def seconds(rows: int, out: int, in_: int, rank: int | None, dtype: torch.dtype, device: torch.device) -> float:
        calls.append((rows, out, in_, rank, dtype, device))
        return rows * 1.0

    prices = pricing("latency", half, Workload(2, 8, 5), seconds=seconds)
    assert prices.linear(4, 6, uses=3) == 3 * (2 * 8 + 5 * 2)
    assert calls == [(16, 4, 6, None, torch.half, CPU), (2, 4, 6, None, torch.half, CPU)]
    # What is known is not measured again.
    prices.linear(4, 6)
    assert len(calls) == 2
    assert pricing("latency", half, Workload(2, 8, 0), seconds=seconds).linear(4, 6) == 16


def test_latency_between_measured_ranks_is_interpolated() -> None:
    ranks = []

    def seconds(rows: int, out: int, in_: int, rank: int | None, dtype: torch.dtype, device: torch.device) -> float:
        if rank is None:
            return float(out) if out == in_ else 1e3
        ranks.append(rank)
        return 10.0 + rank if rank <= 32 else 42.0 + 3.0 * (rank - 32)

    prices = LatencyPricing(Workload(1, 1, 0), torch.float32, CPU, seconds)
    # 128 x 128 breaks even at 64: measured at shares of that, and nowhere else.
    found = prices.low_rank_curve(128, 128, torch.tensor([1, 3, 20, 32, 40, 64, 100]))
    assert sorted(ranks) == [2, 4, 8, 16, 32, 48, 64]
    torch.testing.assert_close(
        found, torch.tensor([11.0, 13.0, 30.0, 42.0, 66.0, 138.0, 246.0], dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert prices.low_rank(128, 128, 20, uses=2) == 60.0


def test_by_default_the_kernel_measures(half: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("skink.kernels.low_rank_linear.break_even")
    module.measured_seconds = lambda *_: 2.0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "skink.kernels.low_rank_linear", ModuleType("low_rank_linear"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert pricing("latency", half).linear(4, 6) == 2.0 * 65


def test_one_thin_matrix_has_one_rank_to_measure() -> None:
    prices = LatencyPricing(Workload(1, 1, 0), torch.float32, CPU, lambda *_: 7.0)
    assert prices.low_rank_curve(1, 1, torch.tensor([1, 2])).tolist() == [7.0, 7.0]
