"""A low-rank layer of half the parameters in the C++ kernels, beside PyTorch's two products and its dense layer.

Of two thin factors (`low_rank_linear`), and pivoted (`pivoted_linear`, with the order of its outputs; PyTorch's side is
then two products, `cat` and `index_select`).

The sides take turns (kernel, two products, dense, reading memory, kernel, ...) and read from one buffer several times
as large as the last-level cache, each where the one before stopped, so that no weight is in a cache when its turn
comes. Memory is read by PyTorch's fastest reader here, among those tried; "of read" is the time in which it would
read the factors, over the time that the kernel took. Times are medians.

For one row two bars are shown: 2.3 times the dense layer's speed, and 85% of the bandwidth.

With --huge-pages the buffer that all sides read from is in huge pages, where Linux gives them.

    python benchmarks/cpu/low_rank_linear.py [--threads N] [--rounds N] [--only NAME] [--huge-pages] [--json]
"""

import argparse
import json
import math
import mmap
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from skink.kernels.cpp import library, use_instruction_set
from skink.kernels.low_rank_linear.cpu import FEW_ROWS
from skink.kernels.low_rank_linear.reference import low_rank_linear as two_products
from skink.kernels.pivoted_linear.reference import pivoted_linear as pivoted_products

SPEEDUP, SHARE = 2.3, 0.85

_READ_BYTES = 128 << 20
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One layer at one number of rows."""

    dtype: str
    out: int
    in_: int
    rows: int
    pivoted: bool = False

    @property
    def rank(self) -> int:
        """The rank at which the factors have half of the layer's parameters."""
        half, sides = self.out * self.in_ / 2, self.out + self.in_
        if self.pivoted:  # rank * (sides - rank) = half
            return int((sides - math.sqrt(sides * sides - 4 * half)) / 2)
        return int(half / sides)

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the two factors."""
        return (self.rank, self.in_), (self.out - self.rank * self.pivoted, self.rank)

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.out}x{self.in_} {self.dtype} rows {self.rows}{' pivoted' if self.pivoted else ''}"


@dataclass(frozen=True)
class Result:
    """Medians in microseconds; `spread_us` is between the quarters."""

    name: str
    rank: int
    kernel_us: float
    spread_us: float
    products_us: float
    dense_us: float
    over_products: float
    over_dense: float
    gigabytes_per_second: float
    of_read: float
    served_by: str


class Cold:
    """Hands out weights from a buffer so large that what is handed out again has left every cache."""

    def __init__(self, size: int, dtype: torch.dtype, *, huge_pages: bool = False) -> None:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
        self.buffer = torch.frombuffer(memory, dtype=dtype).fill_(0.01)
        self.at = 0

    def take(self, *shape: int) -> Tensor:
        """The next matrix; 64 bytes apart from the one before."""
        count = shape[0] * shape[1]
        if self.at + count > self.buffer.numel():
            self.at = 0
        found = self.buffer[self.at : self.at + count].view(shape)
        self.at += -(-count // 64) * 64
        return found


def _cases() -> Iterator[Case]:
    for dtype in ("f32", "bf16"):
        for out, in_ in ((11008, 4096), (4096, 11008)):
            for rows in (1, 2, 4, 8):
                yield Case(dtype, out, in_, rows)
                yield Case(dtype, out, in_, rows, pivoted=True)
    for dtype in ("f32", "bf16", "f16"):
        for rows in (1, 2, 4, 6, 8, 12, 16, 24, 32):
            yield Case(dtype, 4096, 4096, rows)
    for dtype in ("f32", "bf16"):
        for pivoted in (False, True):
            yield Case(dtype, 704, 256, 1, pivoted)
            yield Case(dtype, 256, 704, 1, pivoted)


def _seconds(call: Callable[..., object], *operands: Tensor) -> float:
    start = time.perf_counter()
    call(*operands)
    return time.perf_counter() - start


def _readers() -> dict[str, Callable[[Tensor], object]]:
    ones = torch.ones(4096)
    return {
        "torch.mv f32": lambda memory: torch.mv(memory.view(torch.float32).view(-1, 4096), ones),
        "torch.sum f32": lambda memory: memory.view(torch.float32).sum(),
        "torch.amax f32": lambda memory: memory.view(torch.float32).amax(),
    }


def _sides(case: Case) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The kernel, and PyTorch's products."""
    if not case.pivoted:
        return torch.ops.skink_cpp.low_rank_linear.default, two_products
    order = torch.randperm(case.out)
    kernel = torch.ops.skink_cpp.pivoted_linear.default
    return partial(kernel, order=order), partial(pivoted_products, order=order)


def measure(case: Case, rounds: int, cold: Cold) -> tuple[Result, dict[str, float]]:
    """Medians over `rounds` turns of all sides, after checking that they agree; and what each reader gave, in GB/s."""
    dtype = _DTYPES[case.dtype]
    kernel, products = _sides(case)
    x = torch.randn(case.rows, case.in_).to(dtype)
    factors = [(torch.randn(shape) / shape[1] ** 0.5).to(dtype) for shape in case.shapes]
    difference = (kernel(x, *factors) - products(x, *factors)).abs().max().item()
    if difference > (1e-4 if dtype is torch.float32 else 0.1):
        raise SystemExit(f"{case.name}: results differ by {difference}")
    readers = _readers()
    times: dict[str, list[float]] = {side: [] for side in ("kernel", "products", "dense", *readers)}
    large = case.out * case.in_ > 1 << 20
    for turn in range(-2, rounds if large else 10 * rounds):
        found = {}
        for side, call in (("kernel", kernel), ("products", products)):
            found[side] = _seconds(call, x, *(cold.take(*shape) for shape in case.shapes))
        found["dense"] = _seconds(linear, x, cold.take(case.out, case.in_))
        for name, read in readers.items():
            if large or turn < rounds:
                found[name] = _seconds(read, cold.take(_READ_BYTES // dtype.itemsize // 4096, 4096).view(-1))
        if turn >= 0:
            for side, seconds in found.items():
                times[side].append(seconds)
    middle = {side: statistics.median(found) for side, found in times.items()}
    bandwidth = {name: _READ_BYTES / middle[name] / 1e9 for name in readers}
    quarters = statistics.quantiles(times["kernel"])
    rate = sum(map(math.prod, case.shapes)) * dtype.itemsize / middle["kernel"] / 1e9
    result = Result(
        name=case.name,
        rank=case.rank,
        kernel_us=middle["kernel"] * 1e6,
        spread_us=(quarters[2] - quarters[0]) * 1e6,
        products_us=middle["products"] * 1e6,
        dense_us=middle["dense"] * 1e6,
        over_products=middle["products"] / middle["kernel"],
        over_dense=middle["dense"] / middle["kernel"],
        gigabytes_per_second=rate,
        of_read=rate / max(bandwidth.values()),
        served_by="kernel" if case.rows <= FEW_ROWS[dtype] else "products",
    )
    return result, bandwidth


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _last_cache() -> int:
    """Bytes of the largest cache; 64 MiB where the system does not tell."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) << 10 for size in sizes if size.endswith("K")), default=64 << 20)


def _line(result: Result, *, bars: bool) -> str:
    passed = result.over_dense >= SPEEDUP, result.of_read >= SHARE
    verdict = f"{SPEEDUP}x {'met' if passed[0] else 'MISSED'}, {SHARE:.0%} {'met' if passed[1] else 'MISSED'}"
    return (
        f"{result.name:34} {result.rank:5} {result.kernel_us:9.1f} {result.spread_us:7.1f} {result.products_us:9.1f} "
        f"{result.dense_us:9.1f} {result.over_products:7.2f}x {result.over_dense:7.2f}x "
        f"{result.gigabytes_per_second:6.1f} {result.of_read:8.0%} {result.served_by:>9}  {verdict if bars else ''}"
    )


def main() -> None:
    """Runs the cases and prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--instruction-set", default="", help="baseline, avx2 or avx512; default the best")
    parser.add_argument("--huge-pages", action="store_true", help="Linux alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    loaded = library()
    if not loaded.available:
        raise SystemExit(f"nothing to measure: {loaded.reason}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size = max(1 << 30, 3 * _last_cache() & -(1 << 21))
    setting = {
        "processor": _processor(),
        "threads": options.threads,
        "instruction_set": options.instruction_set or loaded.instruction_set,
        "buffer_megabytes": size >> 20,
        "last_level_cache_megabytes": _last_cache() >> 20,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "huge_pages": options.huge_pages,
        "rounds": options.rounds,
        "load_average": round(os.getloadavg()[0], 1),
    }
    if not options.json:
        print(", ".join(f"{name} {value}" for name, value in setting.items()))
        print(
            f"{'out x in':34} {'rank':>5} {'kernel us':>9} {'+-':>7} {'two us':>9} {'dense us':>9} {'/two':>8} "
            f"{'/dense':>8} {'GB/s':>6} {'of read':>8} {'served by':>9}"
        )
    results: list[Result] = []
    read: dict[str, list[float]] = {}
    cold: Cold | None = None
    with use_instruction_set(str(setting["instruction_set"])), torch.inference_mode():
        for case in _cases():
            if options.only not in case.name:
                continue
            dtype = _DTYPES[case.dtype]
            if cold is None or cold.buffer.dtype is not dtype:
                cold = None  # so that there are never two
                cold = Cold(size, dtype, huge_pages=options.huge_pages)
            result, bandwidth = measure(case, options.rounds, cold)
            results.append(result)
            for name, rate in bandwidth.items():
                read.setdefault(name, []).append(rate)
            if not options.json:
                print(_line(result, bars=case.rows == 1 and 11008 in (case.out, case.in_)), flush=True)
    rates = {name: round(statistics.median(found), 1) for name, found in read.items()}
    if options.json:
        data = {"setting": setting, "read_gigabytes_per_second": rates, "results": [asdict(entry) for entry in results]}
        print(json.dumps(data, indent=2))
    else:
        print("reading memory, GB/s: " + ", ".join(f"{name} {rate}" for name, rate in rates.items()))


if __name__ == "__main__":
    main()
