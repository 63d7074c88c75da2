"""Measured seconds of a linear layer and of its low-rank form on this machine: what lowering and latency budgets ask.

A layer is timed as decoding finds it, its weights no longer in the core's own caches: the calls go round over copies.
The forms of a layer take turns, and the median of each counts. What was measured is kept in memory, and on disk in a
file for each machine, number of threads and version; such a file may be deleted at any time.
"""

import hashlib
import importlib.util
import json
import logging
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import metadata
from itertools import cycle
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

from skink.kernels.cpp.library import library
from skink.kernels.low_rank_linear.op import OP
from skink.kernels.low_rank_linear.reference import low_rank_linear as two_products
from skink.kernels.opdef import OpCall
from skink.kernels.pivoted_linear.op import OP as PIVOTED
from skink.kernels.pivoted_linear.reference import pivoted_linear as pivoted_products
from skink.settings import cache_folder, settings

Form = Literal["dense", "products", "fused"]
# (rows, out, in, rank or 0, dtype, device), and `pivoted` where the form is
_Shape = tuple[int, int, int, int, str, str] | tuple[int, int, int, int, str, str, str]

_SECONDS = 0.02  # for one form; large layers take the fewest rounds
_ROUNDS = (5, 31)
_COPIES = 256
_COLD_BYTES = 32 << 20  # more than a core's own caches hold; the copies of very small layers need not reach it

_known: dict[str, dict[str, dict[Form, float]]] = {}


def measured_seconds(
    rows: int,
    out: int,
    in_: int,
    rank: int | None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    pivoted: bool = False,
) -> float:
    """Median seconds of one call of a linear layer [out, in_], or of the better form of its product of rank `rank`.

    Args:
        rows: tokens that the call is given, >= 1.
        out: outputs, >= 1.
        in_: inputs, >= 1.
        rank: None for the dense layer; else >= 1, and measured as it is, without rounding.
        dtype: of weights and input, floating.
        device: where it runs; shapes on the meta device are measured on the CPU.
        pivoted: with a rank below `out`: `rank` outputs are kept and the others made of them, all put in order.
    """
    return min(measured_forms(rows, out, in_, rank, dtype, device, pivoted=pivoted).values())


def measured_forms(
    rows: int,
    out: int,
    in_: int,
    rank: int | None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    pivoted: bool = False,
) -> Mapping[Form, float]:
    """Median seconds by form: `dense` without a rank; `products` with one, and `fused` where a kernel serves it."""
    where = torch.device(device)
    if where.type == "meta":
        where = torch.device("cpu")
    shape: _Shape = (rows, out, in_, rank or 0, str(dtype).removeprefix("torch."), where.type)
    if rank and pivoted:
        shape = (*shape[:6], "pivoted")
    key = ",".join(map(str, shape))
    machine = _machine(where)
    if machine not in _known:
        _known[machine] = _read(machine)
    if key not in _known[machine]:
        _known[machine][key] = _measure(shape, dtype, where)
        _write(machine)
    return _known[machine][key]


def forget() -> None:
    """Drop what is known in memory, so that files are read again."""
    _known.clear()


def _forms(
    device: torch.device, operands: tuple[Tensor, ...], order: Tensor | None
) -> dict[Form, Callable[..., Tensor]]:
    if len(operands) == 2:
        return {"dense": linear}
    op, products = (OP, two_products) if order is None else (PIVOTED, partial(pivoted_products, order=order))
    forms: dict[Form, Callable[..., Tensor]] = {"products": products}
    variant, _ = op.choose(OpCall(op.bind(operands, {} if order is None else {"order": order}), device))
    if variant is not None:
        forms["fused"] = variant.load() if order is None else partial(variant.load(), order=order)
    return forms


def _measure(shape: _Shape, dtype: torch.dtype, device: torch.device) -> dict[Form, float]:
    rows, out, in_, rank, _, _, *pivoted = shape
    others = out - rank if pivoted else out
    sizes = ((rank, in_), (others, rank)) if rank else ((out, in_),)
    copy_bytes = sum(math.prod(size) for size in sizes) * dtype.itemsize
    copies = max(2, min(_COPIES, _COLD_BYTES // max(1, copy_bytes)))
    make = partial(torch.full, fill_value=0.01, dtype=dtype, device=device)
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        input = make((rows, in_))
        weights = cycle([tuple(make(size) for size in sizes) for _ in range(copies)])
        order = torch.randperm(out, generator=torch.Generator().manual_seed(0)).to(device) if pivoted else None
        forms = _forms(device, (input, *next(weights)), order)
        times: dict[Form, list[float]] = {form: [] for form in forms}
        for turn in range(-1, _ROUNDS[1]):
            for form, call in forms.items():
                seconds = _seconds(call, (input, *next(weights)), device)
                if turn >= 0:
                    times[form].append(seconds)
            if turn + 1 >= _ROUNDS[0] and max(map(sum, times.values())) > _SECONDS:
                break
    return {form: statistics.median(found) for form, found in times.items()}


def _seconds(call: Callable[..., Tensor], operands: tuple[Tensor, ...], device: torch.device) -> float:
    start = time.perf_counter()
    call(*operands)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def _machine(device: torch.device) -> str:
    """All that times depend on, beside the shape."""
    if device.type == "cuda":
        triton = "triton" if importlib.util.find_spec("triton") is not None else "no kernels"
        where = f"{torch.cuda.get_device_name(device)}, {triton}"
    elif device.type != "cpu":
        where = device.type
    else:
        where = f"{_processor()}, {torch.get_num_threads()} threads, {library().instruction_set or 'no kernels'}"
    return f"{where}, torch {torch.__version__}, skink {_version()}, kernels {settings().kernels}"


def _version() -> str:
    try:
        return metadata.version("skink")
    except metadata.PackageNotFoundError:
        return ""


@cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _file(machine: str) -> Path:
    return cache_folder() / f"break-even-{hashlib.sha256(machine.encode()).hexdigest()[:12]}.json"


def _read(machine: str) -> dict[str, dict[Form, float]]:
    """What the machine's file says; nothing where it is missing, damaged or another's."""
    try:
        data = json.loads(_file(machine).read_text(encoding="utf-8"))
        if data["machine"] != machine:
            return {}
        return {
            str(shape): {form: float(forms[form]) for form in get_args(Form) if form in forms}
            for shape, forms in data["seconds"].items()
            if forms and all(float(seconds) > 0 for seconds in forms.values())
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write(machine: str) -> None:
    """Add to the machine's file, in one step: a reader finds the old file or the new one, whole."""
    path = _file(machine)
    data = {"machine": machine, "seconds": {**_read(machine), **_known[machine]}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False) as file:
            json.dump(data, file)
        os.replace(file.name, path)
    except OSError as error:
        # The times are known all the same; the next process measures again.
        logging.getLogger(__name__).debug("measured times could not be kept in %s: %s", path, error)
