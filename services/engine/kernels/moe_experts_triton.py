# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Routed experts on CUDA: sort the tokens by expert, two grouped products (the first ends in silu(gate) * up), one sum.

Nothing depends on the host knowing how many tokens an expert has: grids are sized for the most there can be, and
programs beyond the real number of blocks leave at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from services.engine.kernels.dependent_launch import begin_after_earlier, dependent
from services.engine.kernels.fp8_linear_triton import quantize_rows
from services.engine.kernels.moe_align_triton import Blocks, align


@dataclass(frozen=True)
class Cut:
    """How both products are cut: block_n_gate_up rows of gate and as many of up; block_n_down rows of down."""

    block_m: int
    block_n_gate_up: int
    block_n_down: int
    block_k: int
    num_warps: int
    num_stages: int


def cut_for(num_tokens: int, num_chosen: int, num_experts: int, dtype: torch.dtype) -> Cut:
    """The measured best on an H100, by the tokens an expert has on average; `dtype` is the weights'."""
    per_expert = num_tokens * num_chosen / num_experts
    if dtype == torch.float32:
        return Cut(16, 32, 32, 32, 4, 2)
    is_fp8 = dtype == torch.float8_e4m3fn
    if per_expert <= 16:
        return Cut(16, 64, 64, 128, 4, 4)
    if per_expert <= 32:
        return Cut(32, 64, 64, 128, 4, 4)
    if per_expert <= 128:
        return Cut(64, 64, 128, 128, 4, 4) if is_fp8 else Cut(64, 64, 128, 64, 4, 4)
    return Cut(128, 64, 128, 128, 8, 4) if is_fp8 else Cut(128, 128, 256, 64, 8, 3)


def moe_experts_triton(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    round_scales_to_power_of_two: bool,
    added: torch.Tensor | None = None,
    is_added: torch.cuda.Event | None = None,
    cut: Cut | None = None,
) -> torch.Tensor:
    """See `moe_experts`."""
    num_tokens, num_chosen = topk_ids.shape
    num_experts, model, width = down.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if num_tokens == 0:
        return out
    cut = cut or cut_for(num_tokens, num_chosen, num_experts, gate_up.dtype)
    blocks = align(topk_ids, num_experts, cut.block_m) if num_tokens > 1 else _one_token(topk_ids, cut.block_m)
    hidden = torch.empty(num_tokens * num_chosen, width, dtype=x.dtype, device=x.device)
    outputs = torch.empty(num_tokens * num_chosen, model, dtype=x.dtype, device=x.device)
    rounds = round_scales_to_power_of_two
    _grouped(x.contiguous(), gate_up, gate_up_scale, hidden, blocks, num_chosen, cut, rounds, is_gate_up=True)
    _grouped(hidden, down, down_scale, outputs, blocks, 1, cut, rounds, is_gate_up=False)
    if is_added is not None:
        torch.cuda.current_stream().wait_event(is_added)
    block_d = min(1024, triton.next_power_of_2(model))
    _sum_chosen[(num_tokens, triton.cdiv(model, block_d))](
        outputs,
        topk_weights.contiguous(),
        added.contiguous() if added is not None else out,
        out,
        model,
        CHOSEN=num_chosen,
        ADDS=added is not None,
        BLOCK_D=block_d,
        **dependent(x.device),
    )
    return out


def _one_token(topk_ids: torch.Tensor, height: int) -> Blocks:
    """Every expert of the only token is a block of one row: nothing to sort, and the rest is not read."""
    ids = topk_ids.flatten()
    return Blocks(ids, ids, ids, ids, ids, len(ids), height, is_one_token=True)


def _grouped(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor | None,
    out: torch.Tensor,
    blocks: Blocks,
    assignments_per_row: int,
    cut: Cut,
    rounds: bool,
    is_gate_up: bool,
) -> None:
    """out[a] = weights[expert of a] applied to x[a // assignments_per_row], for every assignment a."""
    num_channels = x.shape[1]
    num_outputs = out.shape[1]
    is_fp8 = scales is not None
    x_scales = x
    if is_fp8:
        x, x_scales = quantize_rows(x, rounds)
    block_n = cut.block_n_gate_up if is_gate_up else cut.block_n_down
    _multiply[(blocks.max_blocks * triton.cdiv(num_outputs, block_n),)](
        x,
        x_scales,
        weights,
        scales if scales is not None else weights,
        out,
        blocks.assignments,
        blocks.experts,
        blocks.counts,
        blocks.starts,
        blocks.num_blocks,
        blocks.max_blocks,
        num_outputs,
        num_channels,
        assignments_per_row,
        IS_ONE_TOKEN=blocks.is_one_token,
        IS_GATE_UP=is_gate_up,
        IS_FP8=is_fp8,
        BLOCK_M=cut.block_m,
        BLOCK_N=block_n,
        BLOCK_K=128 if is_fp8 else cut.block_k,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        **dependent(x.device),
    )


@triton.jit(do_not_specialize=["max_blocks"])
def _multiply(
    x,
    x_scales,
    weights,
    scales,
    out,
    assignments,
    experts,
    counts,
    starts,
    num_blocks,
    max_blocks,
    num_outputs,
    num_channels,
    assignments_per_row,
    IS_ONE_TOKEN: tl.constexpr,
    IS_GATE_UP: tl.constexpr,
    IS_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """One block of tokens against BLOCK_N rows of its expert (and as many of up). FP8: BLOCK_N divides BLOCK_K."""
    begin_after_earlier(IS_DEPENDENT)
    num_n = tl.cdiv(num_outputs, BLOCK_N)
    # Neighbours share an expert's rows, then the tokens: both stay in the L2 cache.
    block, tile_n = tl.swizzle2d(tl.program_id(0) // num_n, tl.program_id(0) % num_n, max_blocks, num_n, 8)
    m = tl.arange(0, BLOCK_M)
    expert = tl.load(experts + block)
    if IS_ONE_TOKEN:
        is_row = m == 0
        assignment = block + m * 0
    else:
        if block >= tl.load(num_blocks):
            return
        valid = tl.load(counts + expert) - (block - tl.load(starts + expert)) * BLOCK_M
        is_row = m < valid
        assignment = tl.load(assignments + block * BLOCK_M + m, mask=is_row, other=0)
    row = (assignment // assignments_per_row).to(tl.int64)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_output = n < num_outputs
    matrices: tl.constexpr = 2 if IS_GATE_UP else 1
    x_at = x + row[:, None] * num_channels + k[None, :]
    first_row = expert.to(tl.int64) * num_outputs * matrices
    weights_at = weights + (first_row + n)[None, :] * num_channels + k[:, None]
    up_at = weights_at + tl.cast(num_outputs, tl.int64) * num_channels
    num_k = tl.cdiv(num_channels, BLOCK_K)
    scale_rows = tl.cdiv(num_outputs, 128)
    scale_at = scales + (expert.to(tl.int64) * scale_rows * matrices + tile_n * BLOCK_N // 128) * num_k
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(num_k):
        is_channel = step * BLOCK_K + k < num_channels
        a = tl.load(x_at + step * BLOCK_K, mask=is_row[:, None] & is_channel[None, :], other=0.0)
        b_mask = is_output[None, :] & is_channel[:, None]
        b = tl.load(weights_at + step * BLOCK_K, mask=b_mask, other=0.0)
        if IS_GATE_UP:
            b_up = tl.load(up_at + step * BLOCK_K, mask=b_mask, other=0.0)
        if IS_FP8:
            a_scales = tl.load(x_scales + row * num_k + step, mask=is_row, other=0.0)
            acc += tl.dot(a, b) * (a_scales * tl.load(scale_at + step))[:, None]
            if IS_GATE_UP:
                up_scale = tl.load(scale_at + scale_rows * num_k + step)
                acc_up += tl.dot(a, b_up) * (a_scales * up_scale)[:, None]
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")
            if IS_GATE_UP:
                acc_up = tl.dot(a, b_up, acc_up, input_precision="ieee")
    if IS_GATE_UP:
        acc = acc * tl.sigmoid(acc) * acc_up
    out_at = out + assignment[:, None].to(tl.int64) * num_outputs + n[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


@triton.jit
def _sum_chosen(
    outputs,
    weights,
    added,
    out,
    model,
    CHOSEN: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """A token's K outputs under its weights, in fp32, and what is added to them."""
    begin_after_earlier(IS_DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(CHOSEN):
        part = tl.load(outputs + (token * CHOSEN + k) * model + d, mask=d < model, other=0.0)
        acc += part.to(tl.float32) * tl.load(weights + token * CHOSEN + k)
    if ADDS:
        acc += tl.load(added + token * model + d, mask=d < model, other=0.0).to(tl.float32)
    tl.store(out + token * model + d, acc.to(out.dtype.element_ty), mask=d < model)
