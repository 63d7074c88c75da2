"""`skink::low_rank_linear` on NVIDIA GPUs: a Triton kernel for a few rows, PyTorch's products for many.

Each thin product is one launch: the second reads all of the first's result, and the end of a launch is what every
program can wait for. The inner vectors are float32 for one row and never rounded, and stay in the second-level cache.
Each weight is read from memory once.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from skink.kernels.low_rank_linear.reference import low_rank_linear as two_products

# More rows than this go to PyTorch: tiles of tensor cores are 16 rows high, and to here they are one tile.
FEW_ROWS = 16


def launch_options(rows: int) -> dict[str, int]:
    """Tile and warps: outputs of one program, and how many inputs it reads at a time.

    One row is multiplied and summed lane by lane, with few outputs in a program so that there are programs for all
    processors; more go through tensor cores, whose tiles are 16 outputs wide at least.
    """
    if rows == 1:
        return {"block_out": 4, "block_in": 512, "num_warps": 4, "num_stages": 4}
    return {"block_out": 16, "block_in": 128, "num_warps": 4, "num_stages": 4}


@triton.jit  # type: ignore[untyped-decorator]
def thin_product(
    x_at: tl.tensor,
    weight_at: tl.tensor,
    bias_at: tl.tensor,
    y_at: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    y_stride: tl.tensor,
    one_row: tl.constexpr,
    has_bias: tl.constexpr,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
) -> None:
    """y[rows, outputs] = x[rows, width] @ weight[outputs, width]ᵀ + bias, block_out outputs in each program.

    Rows lie `*_stride` elements apart. Sums are float32. Several rows, up to 16, are rounded to the weight's dtype
    before they are multiplied.
    """
    out = tl.program_id(0) * block_out + tl.arange(0, block_out)
    column = tl.arange(0, block_in)
    weight_rows = weight_at + out.to(tl.int64)[:, None] * weight_stride
    out_there = out < outputs
    if one_row:
        sums = tl.zeros((block_out, block_in), dtype=tl.float32)
        for begin in range(0, width, block_in):
            there = begin + column < width
            weight = tl.load(
                weight_rows + (begin + column)[None, :],
                mask=out_there[:, None] & there[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            x = tl.load(x_at + begin + column, mask=there, other=0.0)
            sums += weight.to(tl.float32) * x.to(tl.float32)[None, :]
        y = tl.sum(sums, axis=1)
        if has_bias:
            y += tl.load(bias_at + out, mask=out_there, other=0.0).to(tl.float32)
        tl.store(y_at + out, y.to(y_at.dtype.element_ty), mask=out_there)
    else:
        row = tl.arange(0, 16)
        row_there = row < rows
        x_rows = x_at + row[:, None] * x_stride
        tile = tl.zeros((16, block_out), dtype=tl.float32)
        for begin in range(0, width, block_in):
            there = begin + column < width
            weight = tl.load(
                weight_rows + (begin + column)[None, :],
                mask=out_there[:, None] & there[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            x = tl.load(x_rows + (begin + column)[None, :], mask=row_there[:, None] & there[None, :], other=0.0)
            tile = tl.dot(x.to(weight.dtype), tl.trans(weight), tile, input_precision="ieee")
        if has_bias:
            tile += tl.load(bias_at + out, mask=out_there, other=0.0).to(tl.float32)[None, :]
        at = y_at + row[:, None] * y_stride + out[None, :]
        tl.store(at, tile.to(y_at.dtype.element_ty), mask=row_there[:, None] & out_there[None, :])


def low_rank_linear(input: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """As the reference."""
    width, outputs = input.shape[-1], up.shape[0]
    rows = input.numel() // max(1, width)
    if not 0 < rows <= FEW_ROWS or outputs == 0:
        return two_products(input, down, up, bias)
    x = input.reshape(rows, width)
    inner = torch.empty(rows, down.shape[0], dtype=torch.float32, device=input.device)
    y = torch.empty(rows, outputs, dtype=input.dtype, device=input.device)
    _launch(x, down, None, inner)
    _launch(inner, up, bias, y)
    return y.view(*input.shape[:-1], outputs)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    rows, width = x.shape
    outputs = weight.shape[0]
    if outputs == 0:
        return
    x, weight = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, weight))
    options = launch_options(rows)
    thin_product[(triton.cdiv(outputs, options["block_out"]),)](
        x,
        weight,
        None if bias is None else bias.contiguous(),
        y,
        rows,
        outputs,
        width,
        x.stride(0),
        weight.stride(0),
        y.stride(0),
        one_row=rows == 1,
        has_bias=bias is not None,
        **options,
    )
