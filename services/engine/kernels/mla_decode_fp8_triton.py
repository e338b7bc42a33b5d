# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""MLA decode over FP8 records: as over plain latents, with each tile's numbers made bfloat16 in registers.

The kernel has about 50 clocks of a multiprocessor for a token, so what costs little is what it is built of:

- Two latents are loaded as one 16-bit number. So wide, matrix loads bring them from shared memory in the order in which
  the matrix units want them, for the scores (pairs along the latents) as for the result (pairs along the tokens), and
  every number is taken apart where it is used. Nothing is written back to shared memory.
- Latents of even and of odd index are products of their own, and so are queries and results: nothing is put in order.
- No latent is scaled. The scales of 128 latents each go, a token at a time, into the scores of those 128 and into the
  weights of those 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from services.engine.kernels.mla_decode_runs_triton import block_ids

# What `_numbers` yields is 2 ** -120 of the latents. Queries and scales make up for half of it each, so that scores and
# results on their way stay far from both ends of fp32.
HALF_WAY = tl.constexpr(2.0**60)


@triton.jit
def _numbers(pairs):
    """Of e4m3 numbers two by two, the first and the second of each pair: 2 ** -120 of them, as bfloat16, exactly.

    Exponent and mantissa of e4m3, moved to where bfloat16 has their lowest bits, are that (also where the number is
    subnormal). NaN becomes a number: a record that held NaN has it in its scale.
    """
    return tl.inline_asm_elementwise(
        """
        {
            .reg .b32 first, second, sign;
            shl.b32 first, $2, 4;
            shl.b32 sign, $2, 8;
            and.b32 first, first, 0x07f007f0;
            lop3.b32 $0, first, sign, 0x80008000, 0xf8;
            shr.u32 second, $2, 4;
            and.b32 second, second, 0x07f007f0;
            lop3.b32 $1, second, $2, 0x80008000, 0xf8;
        }
        """,
        "=r,=r,r",
        [pairs],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _records(block, token, tokens, block_stride, RECORD: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the records of a tile's tokens are: that of the tile, and of each token from there."""
    if BLOCK_SIZE % BLOCK_N == 0:
        tile = (block * block_stride + token % BLOCK_SIZE) * RECORD
        at = tokens * RECORD
    else:
        tile = tl.full([], 0, tl.int64)
        # Not the sum times RECORD: of that, Triton would infer that all tokens are aligned as the first of a block is.
        at = block * block_stride * RECORD + (token + tokens) % BLOCK_SIZE * RECORD
    return tile, at


@triton.jit
def attend_fp8(
    q,
    pairs,
    scales,
    ropes,
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
    """The tokens [first, last) of a row. `pairs`, `scales`, `ropes`: the records as int16, fp32 and bfloat16.

    Partial result and log-sum-exp go to `out_at`, [BLOCK_H].
    """
    NUM_SCALES: tl.constexpr = (LATENT + 127) // 128
    PAIRS: tl.constexpr = min(64, LATENT_POW2 // 2)
    RECORD: tl.constexpr = LATENT // 2 + 2 * NUM_SCALES + ROPE
    p = tl.arange(0, PAIRS)[None, :]
    c = tl.arange(0, 2 * PAIRS)[None, :]
    r = tl.arange(0, ROPE_POW2)[None, :]
    tokens = tl.arange(0, BLOCK_N)
    is_head = heads[:, None] < NUM_HEADS

    q_at = q + (row * NUM_HEADS + heads[:, None]).to(tl.int64) * (LATENT + ROPE)
    q_r = tl.load(q_at + LATENT + r, mask=is_head & (r < ROPE), other=0.0).to(tl.bfloat16)
    q_even = ()
    q_odd = ()
    acc_even = ()
    acc_odd = ()
    for g in tl.static_range(NUM_SCALES):
        q_g = tl.load(q_at + 128 * g + c, mask=is_head & (128 * g + c < LATENT), other=0.0)
        q_g = (q_g.to(tl.float32) * HALF_WAY).to(tl.bfloat16)
        even, odd = tl.split(tl.reshape(q_g, BLOCK_H, PAIRS, 2))
        q_even += (even,)
        q_odd += (odd,)
        acc_even += (tl.zeros([BLOCK_H, PAIRS], tl.float32),)
        acc_odd += (tl.zeros([BLOCK_H, PAIRS], tl.float32),)
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    # Summed over the tokens at the end: a sum across warps costs a barrier.
    total_weight = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    block = block_ids(table, first, last, tokens, BLOCK_SIZE, BLOCK_N)
    for token in range(first, last, BLOCK_N):
        is_seen = tokens < last - token
        tile, at = _records(block, token, tokens, block_stride, RECORD, BLOCK_SIZE, BLOCK_N)
        # One tile ahead: a load that waits for another load would cost the pipeline a stage.
        block = block_ids(table, token + BLOCK_N, last, tokens, BLOCK_SIZE, BLOCK_N)
        # The same again, but no longer tied to the latents' rows, among whose many threads each scale would be loaded.
        scale_at = tl.sum(at[:, None], 1) // 2 + LATENT // 4
        kv = ()
        unit = ()
        for g in tl.static_range(NUM_SCALES):
            mask = is_seen[:, None] & (64 * g + p < LATENT // 2)
            kv += (tl.load(pairs + tile + (at[:, None] + 64 * g + p), mask=mask, other=0),)
            unit += (tl.load(scales + tile // 2 + (scale_at + g), mask=is_seen, other=0.0) * HALF_WAY,)
        rope_at = at[:, None] + LATENT // 2 + 2 * NUM_SCALES + r
        k_r = tl.load(ropes + tile + rope_at, mask=is_seen[:, None] & (r < ROPE), other=0.0)

        score = tl.dot(q_r, tl.trans(k_r))
        for g in tl.static_range(NUM_SCALES):
            # Turned before it is taken apart, so that each order has its own matrix load.
            k_even, k_odd = _numbers(tl.trans(kv[g]))
            part = tl.dot(q_even[g], k_even)
            part = tl.dot(q_odd[g], k_odd, part)
            score += part * unit[g][None, :]
        score = tl.where(is_seen[None, :], score * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total_weight = total_weight * shrink[:, None] + weight
        # All before the first product: they share a barrier.
        weights = ()
        for g in tl.static_range(NUM_SCALES):
            weights += ((weight * unit[g][None, :]).to(tl.bfloat16),)
        new_even = ()
        new_odd = ()
        for g in tl.static_range(NUM_SCALES):
            v_even, v_odd = _numbers(kv[g])
            new_even += (tl.dot(weights[g], v_even, acc_even[g] * shrink[:, None]),)
            new_odd += (tl.dot(weights[g], v_odd, acc_odd[g] * shrink[:, None]),)
        acc_even = new_even
        acc_odd = new_odd
        top = new_top

    total = tl.sum(total_weight, 1)
    tl.store(lse + out_at, top + tl.log2(total), mask=heads < NUM_HEADS)
    share = HALF_WAY / total[:, None]
    for g in tl.static_range(NUM_SCALES):
        out = tl.reshape(tl.join(acc_even[g] * share, acc_odd[g] * share), BLOCK_H, 2 * PAIRS)
        mask = is_head & (128 * g + c < LATENT)
        tl.store(partial + out_at[:, None] * LATENT + 128 * g + c, out, mask=mask)
