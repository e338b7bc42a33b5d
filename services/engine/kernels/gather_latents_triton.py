# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Latents from blocks on CUDA: some rows at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 8
# Enough to keep the card busy; where there are more rows, each goes on.
MAX_PROGRAMS = 2048


def gather_latents_triton(
    cache: torch.Tensor, slots: torch.Tensor, kv_lora_rank: int, dtype: torch.dtype, num_slots: torch.Tensor | None
) -> torch.Tensor:
    """See `gather_latents`."""
    num_rows, block_size = slots.shape[0], cache.shape[1]
    is_fp8 = cache.dtype == torch.uint8
    if cache.stride(2) != 1 or cache.stride(1) != cache.shape[2]:
        raise ValueError("the cache must be dense within a block")
    num_scales = -(-kv_lora_rank // 128) if is_fp8 else 0
    rope = (cache.shape[2] - kv_lora_rank - 4 * num_scales) // 2 if is_fp8 else cache.shape[2] - kv_lora_rank
    out = torch.empty(num_rows, kv_lora_rank + rope, dtype=dtype, device=cache.device)
    as_latents = cache.view(torch.float8_e4m3fn) if is_fp8 else cache
    as_scales = cache.view(torch.float32) if is_fp8 else cache
    as_ropes = cache.view(torch.bfloat16) if is_fp8 else cache
    if num_rows:
        _gather[(min(triton.cdiv(num_rows, ROWS), MAX_PROGRAMS),)](
            as_latents,
            as_scales,
            as_ropes,
            slots,
            out,
            num_slots if num_slots is not None else slots,
            num_rows,
            as_latents.stride(0),
            as_scales.stride(0),
            as_ropes.stride(0),
            BLOCK_SIZE=block_size,
            LATENT=kv_lora_rank,
            ROPE=rope,
            IS_FP8=is_fp8,
            IS_COUNTED=num_slots is not None,
            ROWS=ROWS,
            LATENT_POW2=triton.next_power_of_2(kv_lora_rank),
            ROPE_POW2=triton.next_power_of_2(rope),
        )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _gather(
    cache,
    cache_scales,
    cache_ropes,
    slots,
    out,
    num_slots,
    num_rows,
    block_stride,
    block_stride_scales,
    block_stride_ropes,
    BLOCK_SIZE: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
    LATENT_POW2: tl.constexpr,
    ROPE_POW2: tl.constexpr,
):
    c = tl.arange(0, LATENT_POW2)
    r = tl.arange(0, ROPE_POW2)
    if IS_COUNTED:
        num_rows = tl.load(num_slots)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        is_row = row < num_rows
        slot = tl.load(slots + row, mask=is_row, other=0).to(tl.int64)
        block = slot // BLOCK_SIZE
        offset = slot % BLOCK_SIZE
        latent_mask = is_row[:, None] & (c[None, :] < LATENT)
        rope_mask = is_row[:, None] & (r[None, :] < ROPE)
        if IS_FP8:
            scales: tl.constexpr = (LATENT + 127) // 128
            record: tl.constexpr = LATENT + 4 * scales + 2 * ROPE
            at = block * block_stride + offset * record
            latent = tl.load(cache + at[:, None] + c[None, :], mask=latent_mask, other=0.0).to(tl.float32)
            at = block * block_stride_scales + offset * (record // 4) + LATENT // 4
            latent *= tl.load(cache_scales + at[:, None] + c[None, :] // 128, mask=latent_mask, other=0.0)
            at = block * block_stride_ropes + offset * (record // 2) + LATENT // 2 + 2 * scales
            rope = tl.load(cache_ropes + at[:, None] + r[None, :], mask=rope_mask, other=0.0)
        else:
            at = block * block_stride + offset * (LATENT + ROPE)
            latent = tl.load(cache + at[:, None] + c[None, :], mask=latent_mask, other=0.0)
            rope = tl.load(cache + at[:, None] + LATENT + r[None, :], mask=rope_mask, other=0.0)
        out_at = out + row[:, None].to(tl.int64) * (LATENT + ROPE)
        tl.store(out_at + c[None, :], latent.to(out.dtype.element_ty), mask=latent_mask)
        tl.store(out_at + LATENT + r[None, :], rope.to(out.dtype.element_ty), mask=rope_mask)
