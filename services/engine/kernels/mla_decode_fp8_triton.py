# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""MLA decode over FP8 records: as over plain latents, with each tile's numbers scaled to bfloat16 on the way.

A word holds the latents 4w to 4w + 3. They are taken apart into four planes (all first bytes, all second, ...), and so
are the queries and the result: each plane is a product of its own, and nothing has to be put back in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from services.engine.kernels.mla_decode_runs_triton import block_ids, row_ends, run_of, tokens_of


@triton.jit
def _plane(words, scales, LEFT: tl.constexpr):
    """One byte of each word, e4m3, times its scale, as bfloat16; LEFT is how far the byte is from the top.

    An e4m3 byte with its exponent and mantissa shifted to where fp32 has them is the number times 2 ** -120 (also where
    it is subnormal), so three integer operations and the scaling do what conversions take four times as long for. NaN
    becomes 480: a record that held NaN has it in its scale.
    """
    return tl.inline_asm_elementwise(
        """
        {
            .reg .b32 number<2>;
            shl.b32 number0, $1, """
        + LEFT
        + """;
            shl.b32 number1, $2, """
        + LEFT
        + """;
            shr.s32 number0, number0, 4;
            shr.s32 number1, number1, 4;
            and.b32 number0, number0, 0x87f00000;
            and.b32 number1, number1, 0x87f00000;
            mul.f32 number0, number0, $3;
            mul.f32 number1, number1, $4;
            cvt.rn.bf16x2.f32 $0, number1, number0;
        }
        """,
        "=r,r,r,r,r",
        [words, scales],
        dtype=tl.bfloat16,
        is_pure=False,
        pack=2,
    )


@triton.jit
def _load_q(q_at, q_mask, w, PLANE: tl.constexpr, LATENT: tl.constexpr):
    return tl.load(q_at + 4 * w[None, :] + PLANE, mask=q_mask & (w[None, :] < LATENT // 4), other=0.0).to(tl.bfloat16)


@triton.jit(do_not_specialize=["num_rows", "num_workers", "table_stride"])
def attend_fp8(
    q,
    latents,
    scales,
    ropes,
    tables,
    lens,
    partial,
    lse,
    num_rows,
    num_workers,
    table_stride,
    tokens_per_block_stride,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    LATENT_POW2: tl.constexpr,
    ROPE_POW2: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One worker's run of tiles, for one group of heads. Neighbouring programs read the same latents."""
    NUM_SCALES: tl.constexpr = (LATENT + 127) // 128
    SCALES_POW2: tl.constexpr = max(1, LATENT_POW2 // 128)
    WORDS: tl.constexpr = LATENT_POW2 // 4
    RECORD: tl.constexpr = LATENT // 4 + NUM_SCALES + ROPE // 2
    group = tl.program_id(0) % NUM_GROUPS
    worker = tl.program_id(0) // NUM_GROUPS
    rows, lengths, ends = row_ends(lens, num_rows, ROWS, BLOCK_N)
    begin, stop = run_of(worker, num_workers, ends)

    heads = group * BLOCK_H + tl.arange(0, BLOCK_H)
    w = tl.arange(0, WORDS)
    s = tl.arange(0, SCALES_POW2)
    r = tl.arange(0, ROPE_POW2)
    tokens = tl.arange(0, BLOCK_N)
    if begin < stop:
        first_row = tl.sum((ends <= begin).to(tl.int32), 0)
        last_row = tl.sum((ends < stop).to(tl.int32), 0)
        for row in range(first_row, last_row + 1):
            first, last = tokens_of(row, rows, lengths, ends, begin, stop, BLOCK_N)
            q_at = q + (row * NUM_HEADS + heads[:, None]).to(tl.int64) * (LATENT + ROPE)
            q_mask = heads[:, None] < NUM_HEADS
            q_0 = _load_q(q_at, q_mask, w, 0, LATENT)
            q_1 = _load_q(q_at, q_mask, w, 1, LATENT)
            q_2 = _load_q(q_at, q_mask, w, 2, LATENT)
            q_3 = _load_q(q_at, q_mask, w, 3, LATENT)
            q_r = tl.load(q_at + LATENT + r[None, :], mask=q_mask & (r[None, :] < ROPE), other=0.0).to(tl.bfloat16)
            top = tl.full([BLOCK_H], float("-inf"), tl.float32)
            total_weight = tl.zeros([BLOCK_H], tl.float32)
            acc_0 = tl.zeros([BLOCK_H, WORDS], tl.float32)
            acc_1 = acc_0
            acc_2 = acc_0
            acc_3 = acc_0
            table = tables + tl.cast(row, tl.int64) * table_stride
            block = block_ids(table, first, last, tokens, BLOCK_SIZE, BLOCK_N)
            for token in range(first, last, BLOCK_N):
                position = token + tokens
                is_seen = position < last
                first_slot = block * tokens_per_block_stride
                slot = position % BLOCK_SIZE
                # One tile ahead: a load that waits for another load would cost the pipeline a stage.
                block = block_ids(table, token + BLOCK_N, last, tokens, BLOCK_SIZE, BLOCK_N)
                at = (first_slot * RECORD + slot * RECORD)[:, None]
                words = tl.load(latents + at + w[None, :], mask=is_seen[:, None] & (w[None, :] < LATENT // 4), other=0)
                scales_mask = is_seen[:, None] & (s[None, :] < NUM_SCALES)
                number_scales = tl.load(scales + at + LATENT // 4 + s[None, :], mask=scales_mask, other=0.0)
                r_at = (
                    ropes + (first_slot * (2 * RECORD) + slot * (2 * RECORD))[:, None] + 2 * (LATENT // 4 + NUM_SCALES)
                )
                k_r = tl.load(r_at + r[None, :], mask=is_seen[:, None] & (r[None, :] < ROPE), other=0.0)

                # The factor makes up for the exponents' different zero.
                number_scales = number_scales[:, :, None] * 1.329227995784916e36
                number_scales = tl.broadcast_to(number_scales, (BLOCK_N, SCALES_POW2, WORDS // SCALES_POW2))
                number_scales = tl.reshape(number_scales, (BLOCK_N, WORDS))
                kv_0 = _plane(words, number_scales, "24")
                kv_1 = _plane(words, number_scales, "16")
                kv_2 = _plane(words, number_scales, "8")
                kv_3 = _plane(words, number_scales, "0")
                score = tl.dot(q_r, tl.trans(k_r))
                score = tl.dot(q_0, tl.trans(kv_0), score)
                score = tl.dot(q_1, tl.trans(kv_1), score)
                score = tl.dot(q_2, tl.trans(kv_2), score)
                score = tl.dot(q_3, tl.trans(kv_3), score)
                score = tl.where(is_seen[None, :], score * scale_log2, float("-inf"))
                new_top = tl.maximum(top, tl.max(score, 1))
                weight = tl.exp2(score - new_top[:, None])
                shrink = tl.exp2(top - new_top)
                total_weight = total_weight * shrink + tl.sum(weight, 1)
                weight = weight.to(tl.bfloat16)
                acc_0 = tl.dot(weight, kv_0, acc_0 * shrink[:, None])
                acc_1 = tl.dot(weight, kv_1, acc_1 * shrink[:, None])
                acc_2 = tl.dot(weight, kv_2, acc_2 * shrink[:, None])
                acc_3 = tl.dot(weight, kv_3, acc_3 * shrink[:, None])
                top = new_top

            out_at = (worker + row).to(tl.int64) * NUM_HEADS + heads
            tl.store(lse + out_at, top + tl.log2(total_weight), mask=heads < NUM_HEADS)
            pointers = partial + out_at[:, None] * LATENT + 4 * w[None, :]
            mask = (heads[:, None] < NUM_HEADS) & (w[None, :] < LATENT // 4)
            share = 1.0 / total_weight[:, None]
            tl.store(pointers, acc_0 * share, mask=mask)
            tl.store(pointers + 1, acc_1 * share, mask=mask)
            tl.store(pointers + 2, acc_2 * share, mask=mask)
            tl.store(pointers + 3, acc_3 * share, mask=mask)
