# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""silu(gate) * up on CUDA."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.engine.kernels.dependent_launch import begin_after_earlier, dependent

BLOCK = 1024


def silu_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """See `silu_mul`."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up = gate_up.contiguous()
    out = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        grid = (num_rows, triton.cdiv(width, BLOCK))
        _silu_mul[grid](gate_up, out, width, BLOCK=BLOCK, **dependent(out.device))
    return out


@triton.jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr, IS_DEPENDENT: tl.constexpr):
    begin_after_earlier(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * width + m, mask=m < width, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + m, mask=m < width, other=0.0).to(tl.float32)
    tl.store(out + row * width + m, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=m < width)
