# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""MLA decode on CUDA: flash attention over the paged latents, split evenly over the multiprocessors.

The tiles of all sequences, laid end to end, are dealt to the workers in equal runs, whatever the lengths. A worker
leaves a partial result for every sequence it touches, at [worker + row]: both only grow along the runs, so no two meet.
A second kernel merges a row's partial results by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

SCALE_BLOCK = 128


@dataclass(frozen=True)
class Plan:
    """How the kernel is cut. `heads_are_columns`: scores as [tokens, heads], so few heads still fill a wgmma."""

    heads_are_columns: bool
    block_h: int
    block_n: int
    num_warps: int
    num_stages: int
    workers_per_sm: int


def plan_for(num_heads: int, latent: int, cache_dtype: torch.dtype) -> Plan:
    """The measured best on an H100."""
    block_h = min(max(16, triton.next_power_of_2(num_heads)), 64)
    if cache_dtype == torch.float32:
        return Plan(False, 16, 16, 4, 2, 1)
    if block_h == 64:
        return Plan(False, 64, 64 if latent > 256 else 32, 8, 2, 1)
    return Plan(True, block_h, 64, 4, 2, 1)


def mla_decode_triton(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    kv_lora_rank: int,
    max_context_len: int | None = None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """See `mla_decode`."""
    num_rows, num_heads, width = q.shape
    rope = width - kv_lora_rank
    is_fp8 = cache.dtype == torch.uint8
    latents, scales, ropes, record, scale_at, rope_at = _views(cache, kv_lora_rank)
    plan = plan or plan_for(num_heads, kv_lora_rank, cache.dtype)
    num_groups = triton.cdiv(num_heads, plan.block_h)
    num_workers = max(1, _num_sms(q.device) * plan.workers_per_sm // num_groups)
    if max_context_len is not None:
        num_workers = min(num_workers, max(1, num_rows * triton.cdiv(max_context_len, plan.block_n)))
    q = q.contiguous()
    partial = torch.empty(num_workers + num_rows, num_heads, kv_lora_rank, dtype=torch.float32, device=q.device)
    lse = torch.empty(num_workers + num_rows, num_heads, dtype=torch.float32, device=q.device)
    out = torch.empty(num_rows, num_heads, kv_lora_rank, dtype=q.dtype, device=q.device)
    rows_pow2 = max(16, triton.next_power_of_2(num_rows))
    latent_pow2 = max(16, triton.next_power_of_2(kv_lora_rank))
    _attend[(num_workers * num_groups,)](
        q,
        latents,
        scales,
        ropes,
        block_tables,
        context_lens,
        partial,
        lse,
        num_rows,
        num_workers,
        block_tables.stride(0),
        cache.stride(0) // cache.stride(1),
        scale * 1.4426950408889634,
        NUM_HEADS=num_heads,
        NUM_GROUPS=num_groups,
        BLOCK_SIZE=cache.shape[1],
        LATENT=kv_lora_rank,
        ROPE=rope,
        RECORD=record,
        SCALE_AT=scale_at,
        ROPE_AT=rope_at,
        IS_FP8=is_fp8,
        HEADS_ARE_COLUMNS=plan.heads_are_columns,
        ROWS=rows_pow2,
        LATENT_POW2=latent_pow2,
        ROPE_POW2=max(16, triton.next_power_of_2(rope)),
        BLOCK_H=plan.block_h,
        BLOCK_N=plan.block_n,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    _merge[(num_heads, num_rows)](
        partial,
        lse,
        context_lens,
        out,
        num_rows,
        num_workers,
        NUM_HEADS=num_heads,
        LATENT=kv_lora_rank,
        ROWS=rows_pow2,
        LATENT_POW2=latent_pow2,
        BLOCK_N=plan.block_n,
        num_warps=4 if latent_pow2 >= 512 else 1,
    )
    return out


def _views(
    cache: torch.Tensor, latent: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int, int], int, int]:
    """The parts of the cache as their own types, the length of a record in each, and where scales and ropes begin."""
    if cache.stride(2) != 1 or cache.stride(0) % cache.stride(1):
        raise ValueError("a layer of the cache must be dense within a token, and a block a whole number of tokens")
    stride = cache.stride(1)
    if cache.dtype != torch.uint8:
        return cache, cache, cache, (stride, stride, stride), latent, latent
    rope_at = latent + 4 * triton.cdiv(latent, SCALE_BLOCK)
    parts = cache.view(torch.float8_e4m3fn), cache.view(torch.float32), cache.view(torch.bfloat16)
    return (*parts, (stride, stride // 4, stride // 2), latent // 4, rope_at // 2)


def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _row_ends(lens, num_rows, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Every row's length, and the number of tiles up to its end."""
    rows = tl.arange(0, ROWS)
    lengths = tl.load(lens + rows, mask=rows < num_rows, other=0)
    return rows, lengths, tl.cumsum((lengths + BLOCK_N - 1) // BLOCK_N, 0)


@triton.jit
def _scaled(numbers, scales, BLOCK_N: tl.constexpr, LATENT_POW2: tl.constexpr, NUM_SCALES: tl.constexpr):
    """e4m3 [tokens, latent] times its scales [tokens, latent / 128], as bfloat16."""
    blocks = tl.reshape(numbers.to(tl.float32), (BLOCK_N, NUM_SCALES, LATENT_POW2 // NUM_SCALES))
    return tl.reshape((blocks * scales[:, :, None]).to(tl.bfloat16), (BLOCK_N, LATENT_POW2))


@triton.jit
def _blocks(table, token, last, tokens, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The block id of a tile's tokens: one where a block holds a tile, else one a token."""
    if BLOCK_SIZE % BLOCK_N == 0:
        block = tl.load(table + token // BLOCK_SIZE, mask=token < last, other=0)
    else:
        block = tl.load(table + (token + tokens) // BLOCK_SIZE, mask=token + tokens < last, other=0)
    return block.to(tl.int64)


@triton.jit
def _attend(
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
    RECORD: tl.constexpr,
    SCALE_AT: tl.constexpr,
    ROPE_AT: tl.constexpr,
    IS_FP8: tl.constexpr,
    HEADS_ARE_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    LATENT_POW2: tl.constexpr,
    ROPE_POW2: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One worker's run of tiles, for one group of heads. Neighbouring programs read the same latents."""
    NUM_SCALES: tl.constexpr = max(1, LATENT_POW2 // 128)
    PRECISION: tl.constexpr = "ieee"
    group = tl.program_id(0) % NUM_GROUPS
    worker = tl.program_id(0) // NUM_GROUPS
    rows, lengths, ends = _row_ends(lens, num_rows, ROWS, BLOCK_N)
    total = tl.max(ends, 0)
    run = (total + num_workers - 1) // num_workers
    begin = worker * run
    stop = tl.minimum(begin + run, total)

    heads = group * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, LATENT_POW2)
    r = tl.arange(0, ROPE_POW2)
    tokens = tl.arange(0, BLOCK_N)
    if begin < stop:
        first_row = tl.sum((ends <= begin).to(tl.int32), 0)
        last_row = tl.sum((ends < stop).to(tl.int32), 0)
        for row in range(first_row, last_row + 1):
            end_tile = tl.sum(tl.where(rows == row, ends, 0), 0)
            length = tl.sum(tl.where(rows == row, lengths, 0), 0)
            start_tile = end_tile - (length + BLOCK_N - 1) // BLOCK_N
            first = tl.maximum(begin - start_tile, 0) * BLOCK_N
            last = tl.minimum(length, (stop - start_tile) * BLOCK_N)

            q_at = q + (row * NUM_HEADS + heads[:, None]).to(tl.int64) * (LATENT + ROPE)
            q_mask = heads[:, None] < NUM_HEADS
            q_c = tl.load(q_at + c[None, :], mask=q_mask & (c[None, :] < LATENT), other=0.0)
            q_r = tl.load(q_at + LATENT + r[None, :], mask=q_mask & (r[None, :] < ROPE), other=0.0)
            top = tl.full([BLOCK_H], float("-inf"), tl.float32)
            total_weight = tl.zeros([BLOCK_H], tl.float32)
            if HEADS_ARE_COLUMNS:
                acc = tl.zeros([LATENT_POW2, BLOCK_H], tl.float32)
            else:
                acc = tl.zeros([BLOCK_H, LATENT_POW2], tl.float32)
            table = tables + tl.cast(row, tl.int64) * table_stride
            block = _blocks(table, first, last, tokens, BLOCK_SIZE, BLOCK_N)
            for token in range(first, last, BLOCK_N):
                position = token + tokens
                is_seen = position < last
                if BLOCK_SIZE % BLOCK_N == 0:
                    slot = block * tokens_per_block_stride + token % BLOCK_SIZE + tokens
                else:
                    slot = block * tokens_per_block_stride + position % BLOCK_SIZE
                # One tile ahead: a load that waits for another load would cost the pipeline a stage.
                block = _blocks(table, token + BLOCK_N, last, tokens, BLOCK_SIZE, BLOCK_N)
                c_mask = is_seen[:, None] & (c[None, :] < LATENT)
                kv = tl.load(latents + slot[:, None] * RECORD[0] + c[None, :], mask=c_mask, other=0.0)
                k_r = tl.load(
                    ropes + slot[:, None] * RECORD[2] + ROPE_AT + r[None, :],
                    mask=is_seen[:, None] & (r[None, :] < ROPE),
                    other=0.0,
                )
                if IS_FP8:
                    s = tl.arange(0, NUM_SCALES)
                    kv_scales = tl.load(
                        scales + slot[:, None] * RECORD[1] + SCALE_AT + s[None, :], mask=is_seen[:, None], other=0.0
                    )
                    kv = _scaled(kv, kv_scales, BLOCK_N, LATENT_POW2, NUM_SCALES).to(q_c.dtype)
                    k_r = k_r.to(q_r.dtype)
                if HEADS_ARE_COLUMNS:
                    score = tl.dot(kv, tl.trans(q_c), input_precision=PRECISION)
                    score = tl.dot(k_r, tl.trans(q_r), score, input_precision=PRECISION)
                    score = tl.where(is_seen[:, None], score * scale_log2, float("-inf"))
                    new_top = tl.maximum(top, tl.max(score, 0))
                    weight = tl.exp2(score - new_top[None, :])
                    shrink = tl.exp2(top - new_top)
                    total_weight = total_weight * shrink + tl.sum(weight, 0)
                    acc = acc * shrink[None, :]
                    acc = tl.dot(tl.trans(kv), weight.to(kv.dtype), acc, input_precision=PRECISION)
                else:
                    score = tl.dot(q_c, tl.trans(kv), input_precision=PRECISION)
                    score = tl.dot(q_r, tl.trans(k_r), score, input_precision=PRECISION)
                    score = tl.where(is_seen[None, :], score * scale_log2, float("-inf"))
                    new_top = tl.maximum(top, tl.max(score, 1))
                    weight = tl.exp2(score - new_top[:, None])
                    shrink = tl.exp2(top - new_top)
                    total_weight = total_weight * shrink + tl.sum(weight, 1)
                    acc = acc * shrink[:, None]
                    acc = tl.dot(weight.to(kv.dtype), kv, acc, input_precision=PRECISION)
                top = new_top

            out_at = (worker + row).to(tl.int64) * NUM_HEADS + heads
            tl.store(lse + out_at, top + tl.log2(total_weight), mask=heads < NUM_HEADS)
            if HEADS_ARE_COLUMNS:
                pointers = partial + out_at[None, :] * LATENT + c[:, None]
                mask = (heads[None, :] < NUM_HEADS) & (c[:, None] < LATENT)
                tl.store(pointers, acc / total_weight[None, :], mask=mask)
            else:
                pointers = partial + out_at[:, None] * LATENT + c[None, :]
                mask = (heads[:, None] < NUM_HEADS) & (c[None, :] < LATENT)
                tl.store(pointers, acc / total_weight[:, None], mask=mask)


@triton.jit
def _merge(
    partial,
    lse,
    lens,
    out,
    num_rows,
    num_workers,
    NUM_HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROWS: tl.constexpr,
    LATENT_POW2: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One head of one row: the partial results of all workers that touched the row."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    rows, lengths, ends = _row_ends(lens, num_rows, ROWS, BLOCK_N)
    total = tl.max(ends, 0)
    run = tl.maximum((total + num_workers - 1) // num_workers, 1)
    length = tl.sum(tl.where(rows == row, lengths, 0), 0)
    end_tile = tl.sum(tl.where(rows == row, ends, 0), 0)
    start_tile = end_tile - (length + BLOCK_N - 1) // BLOCK_N
    c = tl.arange(0, LATENT_POW2)
    top = float("-inf")
    total_weight = 0.0
    acc = tl.zeros([LATENT_POW2], tl.float32)
    if length > 0:
        for worker in range(start_tile // run, (end_tile - 1) // run + 1):
            at = (worker + row).to(tl.int64) * NUM_HEADS + head
            part_lse = tl.load(lse + at)
            part = tl.load(partial + at * LATENT + c, mask=c < LATENT, other=0.0)
            new_top = tl.maximum(top, part_lse)
            shrink = tl.exp2(top - new_top)
            weight = tl.exp2(part_lse - new_top)
            acc = acc * shrink + part * weight
            total_weight = total_weight * shrink + weight
            top = new_top
        acc = acc / total_weight
    out_at = out + (row.to(tl.int64) * NUM_HEADS + head) * LATENT
    tl.store(out_at + c, acc.to(out.dtype.element_ty), mask=c < LATENT)
