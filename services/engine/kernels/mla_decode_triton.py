# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""MLA decode on CUDA: flash attention over the paged latents, split evenly over the multiprocessors.

A first kernel leaves partial results, a second merges those of a row by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from services.engine.kernels.mla_decode_fp8_triton import attend_fp8
from services.engine.kernels.mla_decode_runs_triton import block_ids, merge, row_ends, run_of, tokens_of


@dataclass(frozen=True)
class Plan:
    """How the kernels are cut: heads and tokens at a time, warps, pipeline stages, programs a multiprocessor."""

    block_h: int
    block_n: int
    num_warps: int
    num_stages: int
    workers_per_sm: int


def plan_for(num_heads: int, latent: int, cache_dtype: torch.dtype) -> Plan:
    """The measured best on an H100."""
    block_h = min(max(16, triton.next_power_of_2(num_heads)), 64)
    if cache_dtype == torch.float32:
        return Plan(16, 16, 4, 2, 1)
    if block_h == 64:
        return Plan(64, 64 if latent > 256 else 32, 8, 2, 1)
    return Plan(block_h, 32, 4, 3, 2)


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
    is_fp8 = cache.dtype == torch.uint8
    if cache.stride(2) != 1 or cache.stride(1) != cache.shape[2] or cache.stride(0) % cache.stride(1):
        raise ValueError("the cache must be dense within a block")
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
    # Of a record, each part as its own type: four latents to a word.
    views = (cache.view(torch.int32), cache.view(torch.float32), cache.view(torch.bfloat16)) if is_fp8 else (cache,)
    kernel = attend_fp8 if is_fp8 else _attend
    kernel[(num_workers * num_groups,)](
        q,
        *views,
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
        ROPE=width - kv_lora_rank,
        ROWS=rows_pow2,
        LATENT_POW2=latent_pow2,
        ROPE_POW2=max(16, triton.next_power_of_2(width - kv_lora_rank)),
        BLOCK_H=plan.block_h,
        BLOCK_N=plan.block_n,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    merge[(num_heads, num_rows)](
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
        PARTS=8,
        num_warps=4 if latent_pow2 >= 512 else 1,
    )
    return out


def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["num_rows", "num_workers", "table_stride"])
def _attend(
    q,
    cache,
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
    group = tl.program_id(0) % NUM_GROUPS
    worker = tl.program_id(0) // NUM_GROUPS
    rows, lengths, ends = row_ends(lens, num_rows, ROWS, BLOCK_N)
    begin, stop = run_of(worker, num_workers, ends)

    heads = group * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, LATENT_POW2)
    r = tl.arange(0, ROPE_POW2)
    tokens = tl.arange(0, BLOCK_N)
    if begin < stop:
        first_row = tl.sum((ends <= begin).to(tl.int32), 0)
        last_row = tl.sum((ends < stop).to(tl.int32), 0)
        for row in range(first_row, last_row + 1):
            first, last = tokens_of(row, rows, lengths, ends, begin, stop, BLOCK_N)
            q_at = q + (row * NUM_HEADS + heads[:, None]).to(tl.int64) * (LATENT + ROPE)
            q_mask = heads[:, None] < NUM_HEADS
            q_c = tl.load(q_at + c[None, :], mask=q_mask & (c[None, :] < LATENT), other=0.0)
            q_r = tl.load(q_at + LATENT + r[None, :], mask=q_mask & (r[None, :] < ROPE), other=0.0)
            top = tl.full([BLOCK_H], float("-inf"), tl.float32)
            total_weight = tl.zeros([BLOCK_H], tl.float32)
            acc = tl.zeros([BLOCK_H, LATENT_POW2], tl.float32)
            table = tables + tl.cast(row, tl.int64) * table_stride
            block = block_ids(table, first, last, tokens, BLOCK_SIZE, BLOCK_N)
            for token in range(first, last, BLOCK_N):
                position = token + tokens
                is_seen = position < last
                first_slot = block * tokens_per_block_stride
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

            out_at = (worker + row).to(tl.int64) * NUM_HEADS + heads
            tl.store(lse + out_at, top + tl.log2(total_weight), mask=heads < NUM_HEADS)
            mask = (heads[:, None] < NUM_HEADS) & (c[None, :] < LATENT)
            tl.store(partial + out_at[:, None] * LATENT + c[None, :], acc / total_weight[:, None], mask=mask)
