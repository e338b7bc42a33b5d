# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""MLA decode over plain latents, of the type of the cache: flash attention of one row over a run of its tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from services.engine.kernels.mla_decode_runs_triton import block_ids


@triton.jit
def attend_numbers(
    q,
    cache,
    table,
    partial,
    lse,
    row,
    first,
    last,
    heads,
    out_at,
    block_stride,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT_POW2: tl.constexpr,
    ROPE_POW2: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The tokens [first, last) of a row. Partial result and log-sum-exp go to `out_at`, [BLOCK_H]."""
    c = tl.arange(0, LATENT_POW2)
    r = tl.arange(0, ROPE_POW2)
    tokens = tl.arange(0, BLOCK_N)
    q_at = q + (row * NUM_HEADS + heads[:, None]).to(tl.int64) * (LATENT + ROPE)
    q_mask = heads[:, None] < NUM_HEADS
    q_c = tl.load(q_at + c[None, :], mask=q_mask & (c[None, :] < LATENT), other=0.0)
    q_r = tl.load(q_at + LATENT + r[None, :], mask=q_mask & (r[None, :] < ROPE), other=0.0)
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total_weight = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, LATENT_POW2], tl.float32)
    block = block_ids(table, first, last, tokens, BLOCK_SIZE, BLOCK_N)
    for token in range(first, last, BLOCK_N):
        position = token + tokens
        is_seen = position < last
        first_slot = block * block_stride
        slot = position % BLOCK_SIZE
        # One tile ahead: a load that waits for another load would cost the pipeline a stage.
        block = block_ids(table, token + BLOCK_N, last, tokens, BLOCK_SIZE, BLOCK_N)
        at = cache + (first_slot * (LATENT + ROPE) + slot * (LATENT + ROPE))[:, None]
        kv = tl.load(at + c[None, :], mask=is_seen[:, None] & (c[None, :] < LATENT), other=0.0)
        k_r = tl.load(at + LATENT + r[None, :], mask=is_seen[:, None] & (r[None, :] < ROPE), other=0.0)
        score = tl.dot(q_c, tl.trans(kv), input_precision="ieee")
        score = tl.dot(q_r, tl.trans(k_r), score, input_precision="ieee")
        score = tl.where(is_seen[None, :], score * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total_weight = total_weight * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(kv.dtype), kv, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    tl.store(lse + out_at, top + tl.log2(total_weight), mask=heads < NUM_HEADS)
    mask = (heads[:, None] < NUM_HEADS) & (c[None, :] < LATENT)
    tl.store(partial + out_at[:, None] * LATENT + c[None, :], acc / total_weight[:, None], mask=mask)
