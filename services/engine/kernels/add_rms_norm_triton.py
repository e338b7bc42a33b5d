# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Residual sum and RMSNorm on CUDA: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.engine.kernels.dependent_launch import begin_after_earlier, dependent


def add_rms_norm_triton(h: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `add_rms_norm`."""
    num_rows, size = h.shape
    if h.stride(1) != 1 or (delta is not None and not (h.is_contiguous() and delta.is_contiguous())):
        raise ValueError("rows must be dense, and those that change one after another")
    out = torch.empty(num_rows, size, dtype=h.dtype, device=h.device)
    if num_rows:
        block = triton.next_power_of_2(size)
        _add_rms_norm[(num_rows,)](
            h,
            delta if delta is not None else h,
            weight,
            out,
            h.stride(0),
            eps,
            SIZE=size,
            ADDS=delta is not None,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
            **dependent(h.device),
        )
    return out


@triton.jit
def _add_rms_norm(
    h,
    delta,
    weight,
    out,
    row_stride,
    eps,
    SIZE: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < SIZE
    w = tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    begin_after_earlier(IS_DEPENDENT)
    at = h + row * row_stride + d
    number = tl.load(at, mask=mask, other=0.0)
    if ADDS:
        added = number.to(tl.float32) + tl.load(delta + row * SIZE + d, mask=mask, other=0.0).to(tl.float32)
        number = added.to(number.dtype)
        tl.store(at, number, mask=mask)
    x = number.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    tl.store(out + row * SIZE + d, (x * w).to(out.dtype.element_ty), mask=mask)
