"""The residual stream takes a layer's output, and its norm is what the next layer reads: one pass over memory.

T tokens, D numbers each.
"""

from __future__ import annotations

import torch


def add_rms_norm(h: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """h [T, D] += delta [T, D] in place (if there is one); returns RMSNorm(h) [T, D].

    The sum is rounded to h's dtype before it is normed, statistics are fp32. Without `delta` the rows of h may be
    strided, and h is not changed.
    """
    if h.is_cuda:
        from services.engine.kernels.add_rms_norm_triton import add_rms_norm_triton

        return add_rms_norm_triton(h, delta, weight, eps)
    return add_rms_norm_reference(h, delta, weight, eps)


def add_rms_norm_reference(
    h: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """`add_rms_norm` in plain PyTorch."""
    if delta is not None:
        h.add_(delta)
    compute = torch.float64 if h.dtype == torch.float64 else torch.float32
    x = h.to(compute)
    return (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(compute)).to(h.dtype)
