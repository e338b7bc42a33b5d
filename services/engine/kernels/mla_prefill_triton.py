# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Causal attention of several sequences on CUDA, without padding: flash attention over tiles of queries.

The tiles of all sequences are laid out by the host, those with the most keys first, so that none of them ends alone.
How many there are is read on the device: programs that find nothing to do leave at once.
A few queries after a long prefix would leave most of the card idle: their keys are split, and the parts merged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from services.engine.kernels.mla_prefill import MAX_PARTS, PrefillWork, max_parts, queries_a_tile
from services.engine.kernels.multiprocessors import num_multiprocessors


@dataclass(frozen=True)
class Tile:
    """How the kernel is cut: queries and keys at a time, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tile_for(dtype: torch.dtype) -> Tile:
    """The measured best on an H100."""
    block_m = queries_a_tile(dtype)
    return Tile(block_m, 16, 4, 2) if dtype == torch.float32 else Tile(block_m, 64, 8, 3)


def mla_prefill_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    k_rope: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    work: PrefillWork,
    out: torch.Tensor,
) -> torch.Tensor:
    """See `mla_prefill`."""
    num_queries, num_heads, _ = q.shape
    nope, rope = k.shape[-1], k_rope.shape[-1]
    value_dim = v.shape[-1]
    if out.stride(2) != 1 or out.stride(1) != value_dim:
        raise ValueError("a token's results must lie one after another")
    if num_queries == 0:
        return out
    tile = tile_for(q.dtype)
    q, k, k_rope, v = (_addressable(part) for part in (q, k, k_rope.unsqueeze(1), v))
    width_a, width_b = max(16, triton.next_power_of_2(nope)), max(16, triton.next_power_of_2(rope))
    value_pow2 = max(16, triton.next_power_of_2(value_dim))
    # Whatever is split has as many programs as the card has places, at most.
    num_sms = num_multiprocessors(q.device)
    num_programs = max(len(work.tiles) * num_heads, num_sms if work.may_split else 0)
    partial, lse = out, out
    if work.may_split:
        parts = max_parts(num_heads, num_sms)
        partial = torch.empty(parts, num_queries, num_heads, value_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(parts, num_queries, num_heads, dtype=torch.float32, device=q.device)
    _attend[(num_programs,)](
        _columns(q, tile.block_m, width_a),
        _columns(q, tile.block_m, width_b),
        _columns(k, tile.block_n, width_a),
        _columns(k_rope, tile.block_n, width_b),
        _columns(v, tile.block_n, value_pow2),
        partial,
        lse,
        work.tiles,
        work.counts,
        num_queries,
        scale * 1.4426950408889634,
        q.stride(1),
        k.stride(1),
        v.stride(1),
        num_heads * value_dim if work.may_split else out.stride(0),
        NUM_HEADS=num_heads,
        NOPE=nope,
        ROPE=rope,
        WIDTH_A=width_a,
        WIDTH_B=width_b,
        VALUE=value_dim,
        VALUE_POW2=value_pow2,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        IS_SPLIT=work.may_split,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if work.may_split:
        _merge[(num_queries, num_heads)](
            partial,
            lse,
            out,
            work.counts,
            num_queries,
            out.stride(0),
            NUM_HEADS=num_heads,
            VALUE=value_dim,
            VALUE_POW2=value_pow2,
            MAX_PARTS=MAX_PARTS,
            num_warps=1,
        )
    return out


def _addressable(x: torch.Tensor) -> torch.Tensor:
    """x, copied if the copy engine could not address it: dense rows, everything else a multiple of 16 bytes."""
    size = x.element_size()
    is_aligned = all(stride * size % 16 == 0 for stride in x.stride()[:2]) and x.data_ptr() % 16 == 0
    if x.stride(2) == 1 and is_aligned:
        return x
    padded = torch.empty(*x.shape[:2], -(-x.shape[2] // 16) * 16, dtype=x.dtype, device=x.device)
    return padded[..., : x.shape[2]].copy_(x)


def _columns(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """[T, H, d] as [T, H * d], read `rows` x `columns` at a time; what lies beyond reads as zero."""
    num_columns = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    return TensorDescriptor(x, [x.shape[0], num_columns], [x.stride(0), 1], [rows, columns])


@triton.jit
def _step(
    acc,
    top,
    total,
    q_a,
    q_b,
    k_a_columns,
    k_b_columns,
    v_columns,
    key,
    k_column,
    v_column,
    last_key,
    end_key,
    scale_log2,
    BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """BLOCK_N keys, from `key` on. `last_key` [queries] is the last one each may see, `end_key` the end of them all."""
    k_a = k_a_columns.load([key, k_column])
    score = tl.dot(q_a, k_a.T, input_precision="ieee")
    k_b = k_b_columns.load([key, 0])
    score = tl.dot(q_b, k_b.T, score, input_precision="ieee")
    v = v_columns.load([key, v_column])
    score = score * scale_log2
    if IS_MASKED:
        keys = key + tl.arange(0, BLOCK_N)
        score = tl.where(keys[None, :] <= last_key[:, None], score, float("-inf"))
        # What follows is another sequence: its numbers have weight 0, but 0 times NaN is NaN.
        v = tl.where(keys[:, None] < end_key, v, 0.0)
    new_top = tl.maximum(top, tl.max(score, 1))
    reference = new_top
    if IS_MASKED and IS_SPLIT:  # a query may see nothing of a part
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(score - reference[:, None])
    shrink = tl.exp2(top - reference)
    total = total * shrink + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit(do_not_specialize=["num_queries"])
def _attend(
    q_a_columns,
    q_b_columns,
    k_a_columns,
    k_b_columns,
    v_columns,
    out,
    lse,
    tiles,
    counts,
    num_queries,
    scale_log2,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    out_stride,
    NUM_HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    WIDTH_A: tl.constexpr,
    WIDTH_B: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """One tile of queries of one head, over one part of its keys."""
    num_tiles = tl.load(counts + 1)
    num_parts = tl.load(counts + 2)
    heads_at_once = tl.minimum(tl.load(counts + 3), NUM_HEADS)
    if tl.program_id(0) >= num_tiles * NUM_HEADS * num_parts:
        return
    part = tl.program_id(0) // (num_tiles * NUM_HEADS)
    program = tl.program_id(0) % (num_tiles * NUM_HEADS)
    first_head = program // (heads_at_once * num_tiles) * heads_at_once
    num_heads = tl.minimum(heads_at_once, NUM_HEADS - first_head)
    place = program - first_head * num_tiles
    head = first_head + place % num_heads
    tile = tiles + place // num_heads * 4
    first_query = tl.load(tile)
    end_query = tl.load(tile + 1)
    first_key = tl.load(tile + 2)
    shift = tl.load(tile + 3)
    queries = first_query + tl.arange(0, BLOCK_M)
    end_key = tl.minimum(first_query + BLOCK_M, end_query) + shift
    # Whole steps that every query of the tile may see need no mask.
    end_unmasked = first_key + (first_query + shift + 1 - first_key) // BLOCK_N * BLOCK_N
    stop = end_key
    if IS_SPLIT:
        part_len = tl.cdiv(tl.cdiv(end_key - first_key, BLOCK_N), num_parts) * BLOCK_N
        first_key += part * part_len
        stop = tl.minimum(first_key + part_len, end_key)
        end_unmasked = tl.maximum(tl.minimum(end_unmasked, stop), first_key)

    k_column = head * k_head_stride
    v_column = head * v_head_stride
    q_a = q_a_columns.load([first_query, head * q_head_stride])
    q_b = q_b_columns.load([first_query, head * q_head_stride + NOPE])
    # What lies beside the columns is something else's: nothing multiplies it.
    if WIDTH_A > NOPE:
        q_a = tl.where(tl.arange(0, WIDTH_A)[None, :] < NOPE, q_a, 0.0)
    if WIDTH_B > ROPE:
        q_b = tl.where(tl.arange(0, WIDTH_B)[None, :] < ROPE, q_b, 0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_POW2], tl.float32)
    for key in range(first_key, end_unmasked, BLOCK_N):
        acc, top, total = _step(
            acc, top, total, q_a, q_b, k_a_columns, k_b_columns, v_columns, key, k_column, v_column,
            queries + shift, end_key, scale_log2, BLOCK_N, False, IS_SPLIT,
        )  # fmt: skip
    for key in range(end_unmasked, stop, BLOCK_N):
        acc, top, total = _step(
            acc, top, total, q_a, q_b, k_a_columns, k_b_columns, v_columns, key, k_column, v_column,
            queries + shift, end_key, scale_log2, BLOCK_N, True, IS_SPLIT,
        )  # fmt: skip
    if IS_SPLIT:
        row = part.to(tl.int64) * num_queries + queries
        tl.store(lse + row * NUM_HEADS + head, top + tl.log2(total), mask=queries < end_query)
        total = tl.where(total > 0.0, total, 1.0)
    else:
        row = queries.to(tl.int64)
    values = tl.arange(0, VALUE_POW2)
    out_at = out + row[:, None] * out_stride + head * VALUE + values[None, :]
    mask = (queries[:, None] < end_query) & (values[None, :] < VALUE)
    tl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_queries"])
def _merge(
    partial,
    lse,
    out,
    counts,
    num_queries,
    out_stride,
    NUM_HEADS: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_POW2: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """The parts of one query and head, by their log-sum-exp (-inf for one that it sees nothing of)."""
    query = tl.program_id(0).to(tl.int64)
    if (query < tl.load(counts + 4)) | (query >= tl.load(counts + 5)):
        return
    num_parts = tl.load(counts + 2)
    head = tl.program_id(1)
    p = tl.arange(0, MAX_PARTS)
    values = tl.arange(0, VALUE_POW2)
    at = (p.to(tl.int64) * num_queries + query) * NUM_HEADS + head
    weight = tl.load(lse + at, mask=p < num_parts, other=float("-inf"))
    weight = tl.exp2(weight - tl.max(weight, 0))
    mask = (p[:, None] < num_parts) & (values[None, :] < VALUE)
    parts = tl.load(partial + at[:, None] * VALUE + values[None, :], mask=mask, other=0.0)
    merged = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    out_at = out + query * out_stride + head * VALUE + values
    tl.store(out_at, merged.to(out.dtype.element_ty), mask=values < VALUE)
