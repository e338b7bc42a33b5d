# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Tokens sorted by expert into blocks of equal height, on the device: what a grouped product walks over.

An assignment is t * K + k, token t's k-th expert. Every expert gets whole blocks; the order of many assignments within
an expert is not fixed, and no result depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from services.engine.kernels.dependent_launch import begin_after_earlier, dependent

# Up to here it is one launch: a program an expert, each of which looks at all assignments.
ONE_LAUNCH = 2048
CHUNK = 1024


@dataclass(frozen=True)
class Blocks:
    """Block b is expert `experts[b]`'s; its rows are `assignments[b * height :][: height]`, the first few valid.

    `counts` and `starts` are, by expert, its assignments and its first block. `num_blocks` is one number, on the
    device; `max_blocks` bounds it on the host. `is_one_token`: block b is assignment b, and only `experts` is there.
    """

    assignments: torch.Tensor
    experts: torch.Tensor
    counts: torch.Tensor
    starts: torch.Tensor
    num_blocks: torch.Tensor
    max_blocks: int
    height: int
    is_one_token: bool = False


def align(topk_ids: torch.Tensor, num_experts: int, height: int) -> Blocks:
    """The blocks of [T, K] expert ids."""
    num_assignments = topk_ids.numel()
    max_blocks = min(num_assignments, num_assignments // height + num_experts)
    ids = topk_ids.contiguous()
    experts_pow2 = max(16, triton.next_power_of_2(num_experts))
    sizes = [_whole(size) for size in (*(3 * [experts_pow2]), 1, max_blocks, max_blocks * height)]
    numbers = torch.empty(sum(sizes), dtype=torch.int32, device=ids.device)
    counts, starts, cursors, num_blocks, experts, assignments = numbers.split(sizes)
    launch = dependent(ids.device)
    if num_assignments <= ONE_LAUNCH:
        _align[(num_experts,)](
            ids,
            counts,
            starts,
            num_blocks,
            experts,
            assignments,
            num_assignments,
            HEIGHT=height,
            EXPERTS=experts_pow2,
            ASSIGNMENTS=max(32, triton.next_power_of_2(num_assignments)),
            num_warps=2 if num_assignments <= 512 else 4,
            **launch,
        )
    else:
        chunks = (triton.cdiv(num_assignments, CHUNK),)
        counts.zero_()
        _count[chunks](ids, counts, num_assignments, EXPERTS=experts_pow2, CHUNK=CHUNK, **launch)
        _plan[(1,)](counts, starts, cursors, num_blocks, experts, HEIGHT=height, EXPERTS=experts_pow2, **launch)
        _place[chunks](ids, cursors, assignments, num_assignments, CHUNK=CHUNK, **launch)
    return Blocks(assignments, experts, counts, starts, num_blocks, max_blocks, height)


def _whole(size: int) -> int:
    """As many numbers as begin the next array at a multiple of 16 bytes: where it lies is part of what is compiled."""
    return -(-size // 4) * 4


@triton.jit
def _histogram(ids, at, num_assignments, EXPERTS: tl.constexpr):
    is_valid = at < num_assignments
    chosen = tl.load(ids + at, mask=is_valid, other=0).to(tl.int32)
    return chosen, is_valid, tl.histogram(chosen, EXPERTS, mask=is_valid)


@triton.jit(do_not_specialize=["num_assignments"])
def _align(
    ids,
    counts,
    starts,
    num_blocks,
    experts,
    assignments,
    num_assignments,
    HEIGHT: tl.constexpr,
    EXPERTS: tl.constexpr,
    ASSIGNMENTS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """One expert's blocks; they begin where those of the experts before it end."""
    begin_after_earlier(IS_DEPENDENT)
    own = tl.program_id(0)
    at = tl.arange(0, ASSIGNMENTS)
    chosen, is_valid, histogram = _histogram(ids, at, num_assignments, EXPERTS)
    expert = tl.arange(0, EXPERTS)
    heights = (histogram + HEIGHT - 1) // HEIGHT
    start = tl.sum(tl.where(expert < own, heights, 0), 0)
    count = tl.sum(tl.where(expert == own, histogram, 0), 0)
    tl.store(counts + own, count)
    tl.store(starts + own, start)
    if own == 0:
        tl.store(num_blocks, tl.sum(heights, 0))
    for block in range((count + HEIGHT - 1) // HEIGHT):
        tl.store(experts + start + block, own)
    is_own = is_valid & (chosen == own)
    position = start * HEIGHT + tl.cumsum(is_own.to(tl.int32), 0) - 1
    tl.store(assignments + position, at, mask=is_own)


@triton.jit(do_not_specialize=["num_assignments"])
def _count(ids, counts, num_assignments, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, IS_DEPENDENT: tl.constexpr):
    begin_after_earlier(IS_DEPENDENT)
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    _, _, histogram = _histogram(ids, at, num_assignments, EXPERTS)
    tl.atomic_add(counts + tl.arange(0, EXPERTS), histogram, mask=histogram > 0)


@triton.jit
def _plan(
    counts,
    starts,
    cursors,
    num_blocks,
    experts,
    HEIGHT: tl.constexpr,
    EXPERTS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Blocks to experts, in the experts' order, given how many assignments each has."""
    begin_after_earlier(IS_DEPENDENT)
    expert = tl.arange(0, EXPERTS)
    heights = (tl.load(counts + expert) + HEIGHT - 1) // HEIGHT
    ends = tl.cumsum(heights, 0)
    first = ends - heights
    tl.store(starts + expert, first)
    tl.store(cursors + expert, first * HEIGHT)
    tl.store(num_blocks, tl.max(ends, 0))
    for block in range(tl.max(heights, 0)):
        tl.store(experts + first + block, expert, mask=block < heights)


@triton.jit(do_not_specialize=["num_assignments"])
def _place(ids, cursors, assignments, num_assignments, CHUNK: tl.constexpr, IS_DEPENDENT: tl.constexpr):
    begin_after_earlier(IS_DEPENDENT)
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    is_valid = at < num_assignments
    chosen = tl.load(ids + at, mask=is_valid, other=0).to(tl.int32)
    position = tl.atomic_add(cursors + chosen, 1, mask=is_valid)
    tl.store(assignments + position, at, mask=is_valid)
