# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""MLA decode on CUDA: flash attention over the paged latents, split evenly over the multiprocessors.

A first kernel leaves partial results, a second merges those of a row by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from services.engine.kernels.dependent_launch import begin_after_earlier, dependent
from services.engine.kernels.mla_decode_fp8_triton import attend_fp8
from services.engine.kernels.mla_decode_numbers_triton import attend_numbers
from services.engine.kernels.mla_decode_runs_triton import merge, merge_to_values, row_ends, run_of, tokens_of
from services.engine.kernels.multiprocessors import num_multiprocessors

# Numbers of a value that a program makes of a head's latents.
BLOCK_V = 32


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
    if cache_dtype == torch.uint8:
        return Plan(16, 64, 4, 3, 2) if block_h == 16 else Plan(32, 32, 4, 3, 2)
    if cache_dtype == torch.float32:
        return Plan(16, 16, 4, 2, 1)
    if block_h == 64:
        return Plan(64, 64 if latent > 256 else 32, 8, 2, 1)
    return Plan(block_h, 32, 4, 3, 2)


@dataclass(frozen=True)
class _Partial:
    """What the first kernel leaves for the second: results [workers + rows, H, C] and lse [workers + rows, H], fp32."""

    results: torch.Tensor
    lse: torch.Tensor
    num_workers: int
    sizes: dict[str, int]


def mla_decode_triton(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    kv_lora_rank: int,
    max_context_len: int | None = None,
) -> torch.Tensor:
    """See `mla_decode`."""
    num_rows, num_heads, _ = q.shape
    partial = _attended(q, cache, block_tables, context_lens, scale, kv_lora_rank, max_context_len)
    out = torch.empty(num_rows, num_heads, kv_lora_rank, dtype=q.dtype, device=q.device)
    merge[(num_heads, num_rows)](
        partial.results,
        partial.lse,
        context_lens,
        out,
        num_rows,
        partial.num_workers,
        **partial.sizes,
        PARTS=8,
        num_warps=4 if partial.sizes["LATENT_POW2"] >= 512 else 1,
        **dependent(q.device),
    )
    return out


def mla_decode_to_values_triton(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    value_weights: torch.Tensor,
    out: torch.Tensor,
    max_context_len: int | None = None,
) -> None:
    """See `mla_decode_to_values`; value_weights are dense along C, and out is contiguous."""
    num_rows, num_heads, num_values = out.shape
    partial = _attended(q, cache, block_tables, context_lens, scale, value_weights.shape[1], max_context_len)
    merge_to_values[(num_heads, num_rows, triton.cdiv(num_values, BLOCK_V))](
        partial.results,
        partial.lse,
        context_lens,
        value_weights,
        out,
        value_weights.stride(0),
        value_weights.stride(2),
        num_rows,
        partial.num_workers,
        VALUE=num_values,
        BLOCK_V=BLOCK_V,
        **partial.sizes,
        PARTS=16,
        num_warps=4,
        **dependent(q.device),
    )


def _attended(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    kv_lora_rank: int,
    max_context_len: int | None,
) -> _Partial:
    num_rows, num_heads, width = q.shape
    is_fp8 = cache.dtype == torch.uint8
    if cache.stride(2) != 1 or cache.stride(1) != cache.shape[2] or cache.stride(0) % cache.stride(1):
        raise ValueError("the cache must be dense within a block")
    plan = plan_for(num_heads, kv_lora_rank, cache.dtype)
    num_groups = triton.cdiv(num_heads, plan.block_h)
    num_workers = max(1, num_multiprocessors(q.device) * plan.workers_per_sm // num_groups)
    if max_context_len is not None:
        num_workers = min(num_workers, max(1, num_rows * triton.cdiv(max_context_len, plan.block_n)))
    results = torch.empty(num_workers + num_rows, num_heads, kv_lora_rank, dtype=torch.float32, device=q.device)
    lse = torch.empty(num_workers + num_rows, num_heads, dtype=torch.float32, device=q.device)
    sizes = {
        "NUM_HEADS": num_heads,
        "LATENT": kv_lora_rank,
        "ROWS": max(16, triton.next_power_of_2(num_rows)),
        "LATENT_POW2": max(16, triton.next_power_of_2(kv_lora_rank)),
        "BLOCK_N": plan.block_n,
    }
    # Of a record, each part as its own type: two latents to a number.
    types = (torch.int16, torch.float32, torch.bfloat16) if is_fp8 else (cache.dtype,) * 3
    _attend[(num_workers * num_groups,)](
        q.contiguous(),
        *(cache.view(dtype) for dtype in types),
        block_tables,
        context_lens,
        results,
        lse,
        num_rows,
        num_workers,
        block_tables.stride(0),
        cache.stride(0) // cache.stride(1),
        scale * 1.4426950408889634,
        **sizes,
        IS_FP8=is_fp8,
        NUM_GROUPS=num_groups,
        BLOCK_SIZE=cache.shape[1],
        ROPE=width - kv_lora_rank,
        ROPE_POW2=max(16, triton.next_power_of_2(width - kv_lora_rank)),
        BLOCK_H=plan.block_h,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        **dependent(q.device),
    )
    return _Partial(results, lse, num_workers, sizes)


@triton.jit(do_not_specialize=["num_rows", "num_workers", "table_stride"])
def _attend(
    q,
    cache,
    scales,
    ropes,
    tables,
    lens,
    partial,
    lse,
    num_rows,
    num_workers,
    table_stride,
    block_stride,
    scale_log2,
    IS_FP8: tl.constexpr,
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
    IS_DEPENDENT: tl.constexpr,
):
    """One worker's run of tiles, for one group of heads. Neighbouring programs read the same latents."""
    group = tl.program_id(0) % NUM_GROUPS
    worker = tl.program_id(0) // NUM_GROUPS
    rows, lengths, ends = row_ends(lens, num_rows, ROWS, BLOCK_N)
    begin, stop = run_of(worker, num_workers, ends)
    heads = group * BLOCK_H + tl.arange(0, BLOCK_H)
    begin_after_earlier(IS_DEPENDENT)
    if begin < stop:
        first_row = tl.sum((ends <= begin).to(tl.int32), 0)
        last_row = tl.sum((ends < stop).to(tl.int32), 0)
        for row in range(first_row, last_row + 1):
            first, last = tokens_of(row, rows, lengths, ends, begin, stop, BLOCK_N)
            table = tables + tl.cast(row, tl.int64) * table_stride
            out_at = (worker + row).to(tl.int64) * NUM_HEADS + heads
            if IS_FP8:
                attend_fp8(
                    q,
                    cache,
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
                    NUM_HEADS,
                    BLOCK_SIZE,
                    LATENT,
                    ROPE,
                    LATENT_POW2,
                    ROPE_POW2,
                    BLOCK_H,
                    BLOCK_N,
                )
            else:
                attend_numbers(
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
                    NUM_HEADS,
                    BLOCK_SIZE,
                    LATENT,
                    ROPE,
                    LATENT_POW2,
                    ROPE_POW2,
                    BLOCK_H,
                    BLOCK_N,
                )
