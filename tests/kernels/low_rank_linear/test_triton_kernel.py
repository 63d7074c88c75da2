"""The Triton kernel without a GPU: its numbers in Triton's interpreter, and what it needs when compiled for GPUs.

The interpreter multiplies the bits of bfloat16 in `tl.dot`, so several rows are tried in the other dtypes only.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

NUMBERS = """
import torch
from skink.kernels import LOW_RANK_LINEAR
from skink.kernels.low_rank_linear.triton_kernel import FEW_ROWS, low_rank_linear
from tests.kernels.closeness import assert_close
from tests.kernels.low_rank_linear.cases import exact, operands

torch.manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for rows in (0, 1) if dtype is torch.bfloat16 else (0, 1, 2, 7, FEW_ROWS, FEW_ROWS + 1):
        for width, rank, outputs in ((1, 1, 1), (63, 5, 65), (700, 33, 97), (128, 64, 256)):
            for bias in (True, False):
                given = operands((rows,), width, rank, outputs, dtype, bias=bias)
                assert_close(LOW_RANK_LINEAR, low_rank_linear(*given), exact(*given))
x, down, up, bias = operands((2, 3), 33, 6, 20, torch.float32)
views = (x.transpose(0, 1), down.t().contiguous().t(), torch.randn(20, 50)[:, 3:9], bias)
assert_close(LOW_RANK_LINEAR, low_rank_linear(*views), exact(*views))
"""

RESOURCES = """
import json, re, subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from skink.kernels.low_rank_linear.triton_kernel import launch_options, thin_product

tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
assembler = next((path for name in ("ptxas-blackwell", "ptxas") if (path := tools / name).exists()), None)
found = []
for capability in (80, 90, 100):
    for dtype in ("fp32", "bf16", "fp16"):
        for rows in (1, 8):
            for x, y, has_bias in ((dtype, "fp32", False), ("fp32", dtype, True)):
                options = launch_options(rows)
                tensors = {"x_at": x, "weight_at": dtype, "bias_at": dtype, "y_at": y}
                sizes = ("rows", "outputs", "width", "x_stride", "weight_stride", "y_stride")
                constants = {"one_row": rows == 1, "has_bias": has_bias}
                constants |= {name: options[name] for name in ("block_out", "block_in")}
                signature = {name: f"*{kind}" for name, kind in tensors.items()} | dict.fromkeys(sizes, "i32")
                signature |= dict.fromkeys(constants, "constexpr")
                places = {name: (index,) for index, name in enumerate(signature)}
                whole = [["tt.divisibility", 16]]
                aligned = {places[name]: whole for name in (*tensors, "width", "x_stride", "weight_stride")}
                source = ASTSource(
                    thin_product, signature, {places[name]: value for name, value in constants.items()}, aligned
                )
                compiled = triton.compile(
                    source,
                    target=GPUTarget("cuda", capability, 32),
                    options={name: options[name] for name in ("num_warps", "num_stages")},
                )
                Path("kernel.ptx").write_text(compiled.asm["ptx"])
                report = ""
                if assembler is not None:
                    chip = f"sm_{capability}" + ("a" if capability >= 90 else "")
                    arguments = [assembler, "-v", f"--gpu-name={chip}", "kernel.ptx", "-o", "kernel.bin"]
                    report = subprocess.run(arguments, capture_output=True, text=True, check=True).stderr
                found.append([compiled.metadata.shared, report])
print(json.dumps(found))
"""


def run(code: str, folder: Path, **environment: str) -> str:
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": path}
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_numbers(tmp_path: Path) -> None:
    run(NUMBERS, tmp_path, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_resources(tmp_path: Path) -> None:
    """On three generations: shared memory that every GPU has, nothing spilled, few enough registers for full blocks."""
    found = json.loads(run(RESOURCES, tmp_path))
    assert len(found) == 3 * 3 * 2 * 2
    for shared, report in found:
        assert shared <= 48 << 10
        if report:
            assert "0 bytes spill stores, 0 bytes spill loads" in report
            registers = int(report.partition("Used ")[2].partition(" registers")[0])
            assert registers <= 128


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17])
def test_on_a_gpu(dtype: torch.dtype, rows: int) -> None:
    from skink.kernels import LOW_RANK_LINEAR
    from skink.kernels.low_rank_linear.triton_kernel import low_rank_linear
    from tests.kernels.closeness import assert_close
    from tests.kernels.low_rank_linear.cases import exact, operands

    for width, rank, outputs in ((1, 1, 1), (63, 5, 65), (4096, 333, 1500)):
        given = operands((rows,), width, rank, outputs, dtype)
        found = low_rank_linear(*(tensor.cuda() for tensor in given)).cpu()
        assert_close(LOW_RANK_LINEAR, found, exact(*given))
