"""The latents of whole sequences, read from their blocks into one dense piece, to be expanded for prefill."""

from __future__ import annotations

import torch

from services.engine.kernels.mla_decode import unpack_latents


def gather_latents(
    cache: torch.Tensor,
    slots: torch.Tensor,
    kv_lora_rank: int,
    dtype: torch.dtype,
    num_slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows `slots` [S] int32 (block * block_size + offset) of one layer's view of the pool, as [S, C + R] in `dtype`.

    `cache` is [num_blocks, block_size, width], numbers or FP8 records (see mla_decode.py). num_slots: int32 [1], on
    CUDA: how many of the slots there are; what follows is not read, and undefined in the result.
    """
    if cache.is_cuda:
        from services.engine.kernels.gather_latents_triton import gather_latents_triton

        return gather_latents_triton(cache, slots, kv_lora_rank, dtype, num_slots)
    return gather_latents_reference(cache, slots, kv_lora_rank, dtype)


def gather_latents_reference(
    cache: torch.Tensor, slots: torch.Tensor, kv_lora_rank: int, dtype: torch.dtype
) -> torch.Tensor:
    """`gather_latents` in plain PyTorch."""
    rows = cache[slots.long() // cache.shape[1], slots.long() % cache.shape[1]]
    return (unpack_latents(rows, kv_lora_rank) if cache.dtype == torch.uint8 else rows).to(dtype)
