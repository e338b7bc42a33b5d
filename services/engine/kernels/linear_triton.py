# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""One row times a weight on CUDA: a few of the weight's rows a program, so that all of it is on its way at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.engine.kernels.dependent_launch import begin_after_earlier, dependent

BLOCK_N, BLOCK_K = 4, 1024


def linear_one_row(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See `linear`."""
    num_outputs, num_channels = weight.shape
    if x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError("rows must be dense")
    out = torch.empty(1, num_outputs, dtype=x.dtype, device=x.device)
    _one_row[(triton.cdiv(num_outputs, BLOCK_N),)](
        x,
        weight,
        out,
        num_outputs,
        weight.stride(0),
        SIZE=num_channels,
        BLOCK_N=BLOCK_N,
        BLOCK_K=min(BLOCK_K, triton.next_power_of_2(num_channels)),
        num_warps=4,
        **dependent(x.device),
    )
    return out


@triton.jit
def _one_row(
    x,
    weight,
    out,
    num_outputs,
    weight_stride,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    begin_after_earlier(IS_DEPENDENT)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at = weight + n[:, None].to(tl.int64) * weight_stride + k[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.static_range(0, SIZE, BLOCK_K):
        mask = (n[:, None] < num_outputs) & (start + k[None, :] < SIZE)
        w = tl.load(at + start, mask=mask, other=0.0).to(tl.float32)
        acc += w * tl.load(x + start + k, mask=start + k < SIZE, other=0.0).to(tl.float32)[None, :]
    tl.store(out + n, tl.sum(acc, 1).to(out.dtype.element_ty), mask=n < num_outputs)
