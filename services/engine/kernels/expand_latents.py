"""Latents of many tokens to keys and values of heads: one product, of as many rows as a step happens to have."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def expand_latents(latents: torch.Tensor, weight: torch.Tensor, num_keys: torch.Tensor | None = None) -> torch.Tensor:
    """latents [K, C] times weight [N, C], as [K, N]; sums in fp32 (float64 for float64).

    num_keys: int32 [1], on CUDA: how many rows there are; the rest costs nothing, and is undefined in the result.
    """
    if latents.is_cuda and num_keys is not None:
        from services.engine.kernels.expand_latents_triton import expand_latents_triton

        return expand_latents_triton(latents, weight, num_keys)
    return F.linear(latents, weight)


def expand_latents_reference(latents: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`expand_latents` in plain PyTorch."""
    return F.linear(latents, weight)
