"""The C++ kernels beside PyTorch's own, and beside what the memory allows, in one run.

Both sides get the same tensors in turn (ours, PyTorch's, ours, ...). Where a call must fetch its operands from memory
in real use, as decoding does with the keys and values, enough copies go round that none is still in a cache. The
bandwidth that memory gives is measured in the same rounds; "of limit" is the time in which it would carry the bytes
that a call must move, over the time that the call took. Cached calls have no such limit and show none.

    python benchmarks/cpu/kernels.py [--threads N] [--rounds N] [--only NAME] [--json]
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from skink.kernels.cpp import library, use_instruction_set

_COLD_BYTES = 512 << 20  # more than a last-level cache holds


@dataclass(frozen=True)
class Case:
    """One comparison: `ours` and `theirs` take the same operands, of which `bytes` must cross the memory bus."""

    name: str
    make: Callable[[], tuple[Tensor, ...]]
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    bytes: int
    tolerance: float
    cold: bool


@dataclass(frozen=True)
class Result:
    """Medians in microseconds; `speedup` is theirs / ours; `of_limit` is None for calls that memory does not limit."""

    name: str
    ours_us: float
    spread_us: float
    theirs_us: float
    speedup: float
    gigabytes_per_second: float
    of_limit: float | None


def _bits(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]


def _rms_norm_case(rows: int, width: int, dtype: torch.dtype) -> Case:
    eps = 1e-6
    itemsize = dtype.itemsize
    return Case(
        name=f"rms_norm [{rows}, {width}] {_bits(dtype)}",
        make=lambda: (torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)),
        ours=lambda x, w: torch.ops.skink_cpp.rms_norm(x, w, eps),
        theirs=lambda x, w: rms_norm(x, (width,), w, eps),
        bytes=2 * rows * width * itemsize,
        tolerance=1e-5 if dtype == torch.float32 else 5e-2,
        cold=rows > 64,
    )


def _rotary_theirs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.unsqueeze(1) + rotated * sin.unsqueeze(1)


def _rotary_case(heads: int, tokens: int, width: int, dtype: torch.dtype) -> Case:
    def make() -> tuple[Tensor, ...]:
        angle = torch.randn(1, tokens, width)
        return torch.randn(1, heads, tokens, width).to(dtype), angle.cos().to(dtype), angle.sin().to(dtype)

    return Case(
        name=f"rotary [1, {heads}, {tokens}, {width}] {_bits(dtype)}",
        make=make,
        ours=torch.ops.skink_cpp.rotary,
        theirs=_rotary_theirs,
        bytes=2 * heads * tokens * width * dtype.itemsize,
        tolerance=1e-5 if dtype == torch.float32 else 5e-2,
        cold=tokens > 64,
    )


def _attention_case(
    batch: int, heads: int, key_heads: int, tokens: int, keys: int, width: int, dtype: torch.dtype, *, cold: bool = True
) -> Case:
    def make() -> tuple[Tensor, ...]:
        return (
            torch.randn(batch, heads, tokens, width).to(dtype),
            torch.randn(batch, key_heads, keys, width).to(dtype),
            torch.randn(batch, key_heads, keys, width).to(dtype),
        )

    position = torch.arange(keys - tokens, keys)[:, None]
    allowed = None if tokens == 1 else torch.arange(keys)[None, :] <= position
    scale = width**-0.5
    return Case(
        name=f"attention B{batch} H{heads}/{key_heads} T{tokens} S{keys} D{width} {_bits(dtype)}",
        make=make,
        ours=lambda q, k, v: torch.ops.skink_cpp.attention(q, k, v, scale=scale),
        theirs=lambda q, k, v: scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, scale=scale, enable_gqa=heads != key_heads
        ),
        bytes=2 * batch * key_heads * keys * width * dtype.itemsize,
        tolerance=1e-5 if dtype == torch.float32 else 2e-2,
        cold=cold,
    )


def _cases() -> Iterator[Case]:
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    for dtype in (f32, bf16):
        yield _rms_norm_case(1, 4096, dtype)
        yield _rms_norm_case(512, 4096, dtype)
    for dtype in (f32, bf16):
        yield _rotary_case(32, 1, 128, dtype)
        yield _rotary_case(32, 512, 128, dtype)
    for dtype in (f32, bf16, f16):
        yield _attention_case(1, 32, 32, 1, 2048, 128, dtype)
        yield _attention_case(1, 32, 8, 1, 2048, 128, dtype)
    yield _attention_case(1, 32, 8, 1, 16384, 128, bf16)
    yield _attention_case(8, 32, 8, 1, 1024, 128, bf16)
    yield _attention_case(1, 14, 2, 1, 4096, 64, bf16)
    yield _attention_case(1, 8, 1, 1, 4096, 256, bf16)
    yield _attention_case(1, 8, 4, 1, 512, 32, f32, cold=False)
    yield _attention_case(1, 32, 8, 4, 2048, 128, bf16)
    yield _attention_case(1, 32, 8, 16, 2048, 128, f32)
    yield _attention_case(1, 32, 8, 16, 2048, 128, bf16)
    yield _attention_case(1, 32, 8, 512, 512, 128, f32)


def _seconds(call: Callable[..., Tensor], operands: Sequence[Tensor]) -> float:
    start = time.perf_counter()
    call(*operands)
    return time.perf_counter() - start


class Memory:
    """Reads memory as fast as this process can, by PyTorch's fastest reader, a matrix-vector product."""

    def __init__(self) -> None:
        self.operands = (torch.ones(16 << 10, 4096), torch.ones(4096))
        self.bytes = self.operands[0].numel() * 4

    def seconds(self) -> float:
        """The time of one reading of all `bytes`."""
        return _seconds(torch.mv, self.operands)


def measure(case: Case, rounds: int, memory: Memory) -> Result:
    """Medians over at least `rounds` turns of both sides and of reading memory, after checking that both agree."""
    operands = [case.make()]
    difference = (case.ours(*operands[0]).float() - case.theirs(*operands[0]).float()).abs().max().item()
    if difference > case.tolerance:
        raise SystemExit(f"{case.name}: results differ by {difference}, more than {case.tolerance}")
    if case.cold:
        size = sum(tensor.numel() * tensor.element_size() for tensor in operands[0])
        operands += [tuple(t.clone() for t in operands[0]) for _ in range(min(512, _COLD_BYTES // size))]
    turns = cycle(operands)
    ours: list[float] = []
    theirs: list[float] = []
    reading: list[float] = []
    for turn in range(-6, rounds * (1 if case.cold else 20)):
        # Operands of its own for each side: the second must not find the first one's in the caches.
        a, b = _seconds(case.ours, next(turns)), _seconds(case.theirs, next(turns))
        if turn >= 0:
            ours.append(a)
            theirs.append(b)
            if case.cold:
                reading.append(memory.seconds())
    median = statistics.median(ours)
    quarters = statistics.quantiles(ours)
    return Result(
        name=case.name,
        ours_us=median * 1e6,
        spread_us=(quarters[2] - quarters[0]) * 1e6,
        theirs_us=statistics.median(theirs) * 1e6,
        speedup=statistics.median(theirs) / median,
        gigabytes_per_second=case.bytes / median / 1e9,
        of_limit=case.bytes / memory.bytes * statistics.median(reading) / median if case.cold else None,
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def main() -> None:
    """Runs the cases and prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--instruction-set", default="", help="baseline, avx2 or avx512; default the best")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    loaded = library()
    if not loaded.available:
        raise SystemExit(f"nothing to measure: {loaded.reason}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    memory = Memory()
    fastest = min(memory.seconds() for _ in range(20))
    setting = {
        "processor": _processor(),
        "threads": options.threads,
        "instruction_set": options.instruction_set or loaded.instruction_set,
        "memory_gigabytes_per_second": round(memory.bytes / fastest / 1e9, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rounds": options.rounds,
        "load_average": round(os.getloadavg()[0], 1),
    }
    if not options.json:
        print(", ".join(f"{name} {value}" for name, value in setting.items()))
        print(f"{'case':46} {'ours us':>9} {'+-':>7} {'torch us':>9} {'speedup':>8} {'GB/s':>6} {'of limit':>8}")
    results = []
    with use_instruction_set(str(setting["instruction_set"])), torch.inference_mode():
        for case in _cases():
            if options.only not in case.name:
                continue
            result = measure(case, options.rounds, memory)
            results.append(result)
            if not options.json:
                limit = "cached" if result.of_limit is None else f"{result.of_limit:.0%}"
                print(
                    f"{result.name:46} {result.ours_us:9.1f} {result.spread_us:7.1f} {result.theirs_us:9.1f} "
                    f"{result.speedup:7.2f}x {result.gigabytes_per_second:6.1f} {limit:>8}",
                    flush=True,
                )
    if options.json:
        print(json.dumps({"setting": setting, "results": [asdict(result) for result in results]}, indent=2))


if __name__ == "__main__":
    main()
