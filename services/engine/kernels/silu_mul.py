"""The gate of a feed-forward: silu(gate) * up, both halves of one row."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2M] (gate first) to [T, M]; fp32 inside."""
    if gate_up.is_cuda:
        from services.engine.kernels.silu_mul_triton import silu_mul_triton

        return silu_mul_triton(gate_up)
    return silu_mul_reference(gate_up)


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu_mul` in plain PyTorch."""
    compute = torch.float64 if gate_up.dtype == torch.float64 else torch.float32
    gate, up = gate_up.to(compute).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)
