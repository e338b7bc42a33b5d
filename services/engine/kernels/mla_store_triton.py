# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Rope, the latents' norm and the cache on CUDA: two programs a token, one for its queries, one for its latent.

Of few tokens more programs take the queries to the latents' side, a piece of a head's weights each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.engine.kernels.dependent_launch import begin_after_earlier, dependent

# Numbers of a head's latent that a program takes its query to.
BLOCK_C = 128


def mla_store_triton(
    q: torch.Tensor,
    latents: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    absorbed: torch.Tensor,
    key_weights: torch.Tensor | None = None,
) -> None:
    """See `mla_store`. Without key_weights absorbed takes the roped part only."""
    num_tokens, num_heads, width = q.shape
    rank, half = norm_weight.shape[0], cos.shape[1]
    if num_tokens == 0:
        return
    if q.stride(2) != 1 or q.stride(1) != width or latents.stride(1) != 1 or not absorbed.is_contiguous():
        raise ValueError("rows must be dense")
    if cache.stride(2) != 1 or cache.stride(1) != cache.shape[2]:
        raise ValueError("the cache must be dense within a block")
    is_fp8 = cache.dtype == torch.uint8
    # Of a record, each part as its own type.
    as_latents = cache.view(torch.float8_e4m3fn) if is_fp8 else cache
    as_scales = cache.view(torch.float32) if is_fp8 else cache
    as_ropes = cache.view(torch.bfloat16) if is_fp8 else cache
    num_pieces = triton.cdiv(rank, BLOCK_C)
    _mla_store[(num_tokens, 2 + (num_heads * num_pieces if key_weights is not None else 0))](
        q,
        latents,
        norm_weight,
        eps,
        positions,
        cos,
        sin,
        as_latents,
        as_scales,
        as_ropes,
        slots,
        key_weights if key_weights is not None else q,
        absorbed,
        absorbed.shape[0],
        key_weights.stride(0) if key_weights is not None else 0,
        key_weights.stride(1) if key_weights is not None else 0,
        q.stride(0),
        latents.stride(0),
        as_latents.stride(0),
        as_scales.stride(0),
        as_ropes.stride(0),
        BLOCK_SIZE=cache.shape[1],
        NUM_HEADS=num_heads,
        WIDTH=width,
        LATENT=rank,
        HALF=half,
        IS_FP8=is_fp8,
        SCALE_BLOCK=min(128, rank),
        HEADS_POW2=triton.next_power_of_2(num_heads),
        LATENT_POW2=triton.next_power_of_2(rank),
        HALF_POW2=triton.next_power_of_2(half),
        ABSORBS=key_weights is not None,
        NOPE_POW2=triton.next_power_of_2(max(1, width - 2 * half)),
        BLOCK_C=BLOCK_C,
        num_warps=4,
        **dependent(q.device),
    )


@triton.jit
def _turn(even, odd, c, s):
    return even * c - odd * s, odd * c + even * s


@triton.jit
def _absorb(
    q,
    key_weights,
    absorbed,
    piece,
    head_stride,
    nope_stride,
    WIDTH: tl.constexpr,
    NOPE: tl.constexpr,
    LATENT: tl.constexpr,
    ABSORBED: tl.constexpr,
    NOPE_POW2: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """BLOCK_C numbers of one head's query on the latents' side."""
    pieces: tl.constexpr = (LATENT + BLOCK_C - 1) // BLOCK_C
    head = piece // pieces
    c = piece % pieces * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, NOPE_POW2)
    at = key_weights + head.to(tl.int64) * head_stride + n[:, None] * nope_stride + c[None, :]
    weight = tl.load(at, mask=(n[:, None] < NOPE) & (c[None, :] < LATENT), other=0.0)
    begin_after_earlier(IS_DEPENDENT)
    query = tl.load(q + head * WIDTH + n, mask=n < NOPE, other=0.0).to(tl.float32)
    latent = tl.sum(weight.to(tl.float32) * query[:, None], 0)
    tl.store(absorbed + head * ABSORBED + c, latent.to(absorbed.dtype.element_ty), mask=c < LATENT)


@triton.jit(do_not_specialize=["num_absorbed"])
def _mla_store(
    q,
    latents,
    norm_weight,
    eps,
    positions,
    cos,
    sin,
    cache,
    cache_scales,
    cache_ropes,
    slots,
    key_weights,
    absorbed,
    num_absorbed,
    head_stride,
    nope_stride,
    q_stride,
    latents_stride,
    block_stride,
    block_stride_scales,
    block_stride_ropes,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LATENT: tl.constexpr,
    HALF: tl.constexpr,
    IS_FP8: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    HEADS_POW2: tl.constexpr,
    LATENT_POW2: tl.constexpr,
    HALF_POW2: tl.constexpr,
    ABSORBS: tl.constexpr,
    NOPE_POW2: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if ABSORBS:
        piece = tl.program_id(1) - 2
        if piece >= 0:
            if row < num_absorbed:
                _absorb(
                    q + row * q_stride,
                    key_weights,
                    absorbed + row * NUM_HEADS * (LATENT + 2 * HALF),
                    piece,
                    head_stride,
                    nope_stride,
                    WIDTH,
                    WIDTH - 2 * HALF,
                    LATENT,
                    LATENT + 2 * HALF,
                    NOPE_POW2,
                    BLOCK_C,
                    IS_DEPENDENT,
                )
            return
    position = tl.load(positions + row, cache_modifier=".cg").to(tl.int64)
    j = tl.arange(0, HALF_POW2)
    is_pair = j < HALF
    c = tl.load(cos + position * HALF + j, mask=is_pair, other=0.0)
    s = tl.load(sin + position * HALF + j, mask=is_pair, other=0.0)
    if tl.program_id(1) == 0:
        begin_after_earlier(IS_DEPENDENT)
        head = tl.arange(0, HEADS_POW2)[:, None]
        mask = (head < NUM_HEADS) & is_pair[None, :]
        at = q + row * q_stride + head * WIDTH + (WIDTH - 2 * HALF) + 2 * j[None, :]
        q_even = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        q_odd = tl.load(at + 1, mask=mask, other=0.0).to(tl.float32)
        q_even, q_odd = _turn(q_even, q_odd, c[None, :], s[None, :])
        tl.store(at, q_even.to(q.dtype.element_ty), mask=mask)
        tl.store(at + 1, q_odd.to(q.dtype.element_ty), mask=mask)
        at = absorbed + (row * NUM_HEADS + head) * (LATENT + 2 * HALF) + LATENT + 2 * j[None, :]
        mask = mask & (row < num_absorbed)
        tl.store(at, q_even.to(q.dtype.element_ty), mask=mask)
        tl.store(at + 1, q_odd.to(q.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slots + row, cache_modifier=".cg").to(tl.int64)
        is_kept = slot >= 0
        block = slot // BLOCK_SIZE
        offset = slot % BLOCK_SIZE
        own = latents + row * latents_stride
        i = tl.arange(0, LATENT_POW2)
        is_latent = i < LATENT
        w = tl.load(norm_weight + i, mask=is_latent, other=0.0).to(tl.float32)
        begin_after_earlier(IS_DEPENDENT)
        x = tl.load(own + i, mask=is_latent, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / LATENT + eps) * w
        x = x.to(latents.dtype.element_ty)
        first = tl.load(own + LATENT + 2 * j, mask=is_pair, other=0.0).to(tl.float32)
        second = tl.load(own + LATENT + 2 * j + 1, mask=is_pair, other=0.0).to(tl.float32)
        first, second = _turn(first, second, c, s)
        k_even, k_odd = first.to(latents.dtype.element_ty), second.to(latents.dtype.element_ty)
        tl.store(own + i, x, mask=is_latent)
        tl.store(own + LATENT + 2 * j, k_even, mask=is_pair)
        tl.store(own + LATENT + 2 * j + 1, k_odd, mask=is_pair)
        if IS_FP8:
            scales: tl.constexpr = LATENT // SCALE_BLOCK
            record: tl.constexpr = LATENT + 4 * scales + 4 * HALF
            groups = tl.reshape(x.to(tl.float32), (LATENT_POW2 // SCALE_BLOCK, SCALE_BLOCK))
            scale = tl.div_rn(tl.maximum(tl.max(tl.abs(groups), 1), 1e-4), 448.0)
            quantized = tl.div_rn(groups, tl.broadcast_to(scale[:, None], groups.shape))
            quantized = tl.clamp(quantized, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
            target = cache + block * block_stride + offset * record
            tl.store(target + i, tl.reshape(quantized, (LATENT_POW2,)), mask=is_latent & is_kept)
            g = tl.arange(0, LATENT_POW2 // SCALE_BLOCK)
            target_scales = cache_scales + block * block_stride_scales + offset * (record // 4) + LATENT // 4
            tl.store(target_scales + g, scale, mask=(g < scales) & is_kept)
            target_ropes = cache_ropes + block * block_stride_ropes + offset * (record // 2) + LATENT // 2 + 2 * scales
            tl.store(target_ropes + 2 * j, k_even.to(tl.bfloat16), mask=is_pair & is_kept)
            tl.store(target_ropes + 2 * j + 1, k_odd.to(tl.bfloat16), mask=is_pair & is_kept)
        else:
            target = cache + block * block_stride + offset * (LATENT + 2 * HALF)
            tl.store(target + i, x.to(cache.dtype.element_ty), mask=is_latent & is_kept)
            tl.store(target + LATENT + 2 * j, k_even.to(cache.dtype.element_ty), mask=is_pair & is_kept)
            tl.store(target + LATENT + 2 * j + 1, k_odd.to(cache.dtype.element_ty), mask=is_pair & is_kept)
