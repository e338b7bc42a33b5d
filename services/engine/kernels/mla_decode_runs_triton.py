# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""What the decode kernels share: how tiles are dealt to workers, and how partial results become one.

The tiles, laid end to end, are dealt in equal runs, whatever the lengths. A worker leaves a partial result for every
sequence it touches, at [worker + row]: both only grow along the runs, so no two meet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from services.engine.kernels.dependent_launch import begin_after_earlier


@triton.jit
def row_ends(lens, num_rows, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Every row's length, and the number of tiles up to its end. Lengths are there before the step."""
    rows = tl.arange(0, ROWS)
    lengths = tl.load(lens + rows, mask=rows < num_rows, other=0, cache_modifier=".cg")
    return rows, lengths, tl.cumsum((lengths + BLOCK_N - 1) // BLOCK_N, 0)


@triton.jit
def run_of(worker, num_workers, ends):
    """The tiles [begin, stop) of a worker."""
    total = tl.max(ends, 0)
    run = (total + num_workers - 1) // num_workers
    return worker * run, tl.minimum(worker * run + run, total)


@triton.jit
def tokens_of(row, rows, lengths, ends, begin, stop, BLOCK_N: tl.constexpr):
    """The tokens [first, last) of a row that lie in a run of tiles."""
    end_tile = tl.sum(tl.where(rows == row, ends, 0), 0)
    length = tl.sum(tl.where(rows == row, lengths, 0), 0)
    start_tile = end_tile - (length + BLOCK_N - 1) // BLOCK_N
    first = tl.maximum(begin - start_tile, 0) * BLOCK_N
    return first, tl.minimum(length, (stop - start_tile) * BLOCK_N)


@triton.jit
def block_ids(table, token, last, tokens, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The block id of a tile's tokens: one where a block holds a tile, else one a token."""
    if BLOCK_SIZE % BLOCK_N == 0:
        block = tl.load(table + token // BLOCK_SIZE, mask=token < last, other=0)
    else:
        block = tl.load(table + (token + tokens) // BLOCK_SIZE, mask=token + tokens < last, other=0)
    return block.to(tl.int64)


@triton.jit
def _merged(
    partial,
    lse,
    lens,
    row,
    head,
    num_rows,
    num_workers,
    NUM_HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROWS: tl.constexpr,
    LATENT_POW2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """One head of one row, fp32: the partial results of all workers that touched the row, once they are there."""
    rows, lengths, ends = row_ends(lens, num_rows, ROWS, BLOCK_N)
    total = tl.max(ends, 0)
    run = tl.maximum((total + num_workers - 1) // num_workers, 1)
    length = tl.sum(tl.where(rows == row, lengths, 0), 0)
    end_tile = tl.sum(tl.where(rows == row, ends, 0), 0)
    start_tile = end_tile - (length + BLOCK_N - 1) // BLOCK_N
    c = tl.arange(0, LATENT_POW2)
    part = tl.arange(0, PARTS)
    top = float("-inf")
    total_weight = 0.0
    acc = tl.zeros([LATENT_POW2], tl.float32)
    begin_after_earlier(IS_DEPENDENT)
    if length > 0:
        last_worker = (end_tile - 1) // run
        for worker in range(start_tile // run, last_worker + 1, PARTS):
            at = (worker + part + row).to(tl.int64) * NUM_HEADS + head
            is_part = worker + part <= last_worker
            part_lse = tl.load(lse + at, mask=is_part, other=float("-inf"))
            mask = is_part[:, None] & (c[None, :] < LATENT)
            parts = tl.load(partial + at[:, None] * LATENT + c[None, :], mask=mask, other=0.0)
            new_top = tl.maximum(top, tl.max(part_lse, 0))
            shrink = tl.exp2(top - new_top)
            weight = tl.exp2(part_lse - new_top)
            acc = acc * shrink + tl.sum(parts * weight[:, None], 0)
            total_weight = total_weight * shrink + tl.sum(weight, 0)
            top = new_top
        acc = acc / total_weight
    return acc


@triton.jit(do_not_specialize=["num_rows", "num_workers"])
def merge(
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
    PARTS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """The latents that a head of a row attended to."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    acc = _merged(
        partial,
        lse,
        lens,
        row,
        head,
        num_rows,
        num_workers,
        NUM_HEADS,
        LATENT,
        ROWS,
        LATENT_POW2,
        BLOCK_N,
        PARTS,
        IS_DEPENDENT,
    )
    c = tl.arange(0, LATENT_POW2)
    out_at = out + (row.to(tl.int64) * NUM_HEADS + head) * LATENT
    tl.store(out_at + c, acc.to(out.dtype.element_ty), mask=c < LATENT)


@triton.jit(do_not_specialize=["num_rows", "num_workers"])
def merge_to_values(
    partial,
    lse,
    lens,
    weights,
    out,
    head_stride,
    value_stride,
    num_rows,
    num_workers,
    NUM_HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    LATENT_POW2: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """The same, and what the head makes of them: BLOCK_V numbers of its value. Every program merges for itself."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    c = tl.arange(0, LATENT_POW2)
    at = weights + head.to(tl.int64) * head_stride + v[:, None] * value_stride + c[None, :]
    weight = tl.load(at, mask=(v[:, None] < VALUE) & (c[None, :] < LATENT), other=0.0)
    acc = _merged(
        partial,
        lse,
        lens,
        row,
        head,
        num_rows,
        num_workers,
        NUM_HEADS,
        LATENT,
        ROWS,
        LATENT_POW2,
        BLOCK_N,
        PARTS,
        IS_DEPENDENT,
    )
    latents = acc.to(out.dtype.element_ty).to(tl.float32)  # as they are where another kernel reads them
    value = tl.sum(weight.to(tl.float32) * latents[None, :], 1)
    out_at = out + (row.to(tl.int64) * NUM_HEADS + head) * VALUE
    tl.store(out_at + v, value.to(out.dtype.element_ty), mask=v < VALUE)
