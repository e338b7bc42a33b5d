# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""A few rows times a weight on CUDA: a few of the weight's rows a program, so that all of it is on its way at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.engine.kernels.dependent_launch import begin_after_earlier, dependent

BLOCK_N, BLOCK_K = 4, 2048


def linear_few_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See `linear`."""
    num_rows, num_outputs, num_channels = len(x), *weight.shape
    if x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError("rows must be dense")
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    _few_rows[(triton.cdiv(num_outputs, BLOCK_N),)](
        x,
        weight,
        out,
        num_rows,
        num_outputs,
        x.stride(0),
        weight.stride(0),
        SIZE=num_channels,
        ROWS=triton.next_power_of_2(num_rows),
        BLOCK_N=BLOCK_N,
        BLOCK_K=min(BLOCK_K, triton.next_power_of_2(num_channels)),
        num_warps=4,
        **dependent(x.device),
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows(
    x,
    weight,
    out,
    num_rows,
    num_outputs,
    x_stride,
    weight_stride,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """BLOCK_N numbers of every row. The first channels' weights, often all, are read once, ahead of the rows."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at = weight + n[:, None].to(tl.int64) * weight_stride + k[None, :]
    is_output = n[:, None] < num_outputs
    first = tl.load(at, mask=is_output & (k[None, :] < SIZE), other=0.0)
    begin_after_earlier(IS_DEPENDENT)
    for row in tl.static_range(ROWS):
        x_at = x + tl.cast(row * x_stride, tl.int64) + k
        is_row = row < num_rows
        acc = first.to(tl.float32) * tl.load(x_at, mask=is_row & (k < SIZE), other=0.0).to(tl.float32)[None, :]
        for start in tl.static_range(BLOCK_K, SIZE, BLOCK_K):
            is_channel = start + k < SIZE
            w = tl.load(at + start, mask=is_output & is_channel[None, :], other=0.0).to(tl.float32)
            acc += w * tl.load(x_at + start, mask=is_row & is_channel, other=0.0).to(tl.float32)[None, :]
        mask = is_row & (n < num_outputs)
        tl.store(out + row * num_outputs + n, tl.sum(acc, 1).to(out.dtype.element_ty), mask=mask)
