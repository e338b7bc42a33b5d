# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""FP8 linear layers on CUDA: e4m3 products of 128 channels at a time, each scaled and summed in fp32.

Few tokens leave few programs: then the channels are split among more of them, and summed in a fixed order, so that a
result never depends on timing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from services.engine.kernels.multiprocessors import num_multiprocessors

SCALE_BLOCK = 128


@dataclass(frozen=True)
class Tile:
    """How a product is cut: rows of activations, rows of weights, warps, pipeline stages, the channels' splits."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    num_splits: int = 1


def tile_for(num_tokens: int, num_outputs: int, num_channels: int, num_sms: int) -> Tile:
    """The measured best on an H100."""
    if num_tokens > 128:
        return Tile(128, 128, 8, 4) if num_tokens > 256 else Tile(64, 128, 4, 4)
    block_m = min(max(16, triton.next_power_of_2(num_tokens)), 64)
    block_n = 64 if block_m <= 32 else 128
    programs = triton.cdiv(num_outputs, block_n) * triton.cdiv(num_tokens, block_m)
    num_splits = max(1, min(2 * num_sms // programs, triton.cdiv(num_channels, 4 * SCALE_BLOCK), 16))
    return Tile(block_m, block_n, 4, 5 if block_m <= 32 else 4, num_splits)


def fp8_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    round_scales_to_power_of_two: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """See `fp8_linear`."""
    num_tokens, num_channels = x.shape
    num_outputs = weight.shape[0]
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    tile = tile or tile_for(num_tokens, num_outputs, num_channels, num_multiprocessors(x.device))
    activations, scales = quantize_rows(x, round_scales_to_power_of_two)
    target = out
    if tile.num_splits > 1:
        target = torch.empty(tile.num_splits, num_tokens, num_outputs, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(num_tokens, tile.block_m) * triton.cdiv(num_outputs, tile.block_n), tile.num_splits)
    _multiply[grid](
        activations,
        scales,
        weight,
        scale_inv,
        target,
        num_tokens,
        num_outputs,
        num_channels,
        activations.stride(0),
        weight.stride(0),
        scale_inv.stride(0),
        triton.cdiv(triton.cdiv(num_channels, SCALE_BLOCK), tile.num_splits),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if tile.num_splits > 1:
        _sum_splits[(triton.cdiv(out.numel(), 1024),)](target, out, out.numel(), tile.num_splits, BLOCK=1024)
    return out


def quantize_rows(x: torch.Tensor, round_scales_to_power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_activations` in one kernel: [T, K] e4m3 and its scales [T, ceil(K / 128)] fp32."""
    num_tokens, num_channels = x.shape
    num_blocks = triton.cdiv(num_channels, SCALE_BLOCK)
    quantized = torch.empty(num_tokens, num_channels, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_tokens, num_blocks, dtype=torch.float32, device=x.device)
    block_m = min(16, triton.next_power_of_2(num_tokens))
    _quantize[(triton.cdiv(num_tokens, block_m), num_blocks)](
        x,
        quantized,
        scales,
        num_tokens,
        num_channels,
        x.stride(0),
        ROUNDS=round_scales_to_power_of_two,
        BLOCK_M=block_m,
        num_warps=4 if block_m == 16 else 1,
    )
    return quantized, scales


@triton.jit
def _quantize_tile(x, ROUNDS: tl.constexpr):
    """[rows, 128 channels] to e4m3 and a scale a row."""
    x = x.to(tl.float32)
    scales = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 1), 1e-4), 448.0)
    if ROUNDS:
        bits = scales.to(tl.int32, bitcast=True)
        # Up to the next power of two unless it is one: the mantissa is empty then.
        exponents = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
        scales = (exponents << 23).to(tl.float32, bitcast=True)
    quantized = tl.div_rn(x, tl.broadcast_to(scales[:, None], x.shape))
    return tl.clamp(quantized, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv), scales


@triton.jit(do_not_specialize=["num_tokens"])
def _quantize(x, quantized, scales, num_tokens, num_channels, row_stride, ROUNDS: tl.constexpr, BLOCK_M: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(1)
    channels = block * 128 + tl.arange(0, 128)
    mask = (rows[:, None] < num_tokens) & (channels[None, :] < num_channels)
    numbers = tl.load(x + rows[:, None].to(tl.int64) * row_stride + channels[None, :], mask=mask, other=0.0)
    e4m3, row_scales = _quantize_tile(numbers, ROUNDS)
    tl.store(quantized + rows[:, None].to(tl.int64) * num_channels + channels[None, :], e4m3, mask=mask)
    tl.store(scales + rows.to(tl.int64) * tl.num_programs(1) + block, row_scales, mask=rows < num_tokens)


@triton.jit(do_not_specialize=["num_tokens", "blocks_per_split"])
def _multiply(
    x,
    x_scales,
    weight,
    scale_inv,
    out,
    num_tokens,
    num_outputs,
    num_channels,
    x_stride,
    weight_stride,
    scale_stride,
    blocks_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of the outputs, over one split of the channels. BLOCK_N divides 128: one weight scale a step."""
    num_n = tl.cdiv(num_outputs, BLOCK_N)
    tile_m, tile_n = tl.swizzle2d(
        tl.program_id(0) // num_n, tl.program_id(0) % num_n, tl.cdiv(num_tokens, BLOCK_M), num_n, 8
    )
    split = tl.program_id(1)
    num_blocks = tl.cdiv(num_channels, 128)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, 128)
    x_at = x + rows[:, None].to(tl.int64) * x_stride + channels[None, :]
    weight_at = weight + outputs[None, :].to(tl.int64) * weight_stride + channels[:, None]
    scale_at = scale_inv + (tile_n * BLOCK_N // 128) * scale_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(split * blocks_per_split, tl.minimum((split + 1) * blocks_per_split, num_blocks)):
        is_channel = block * 128 + channels < num_channels
        x_mask = (rows[:, None] < num_tokens) & is_channel[None, :]
        a = tl.load(x_at + block * 128, mask=x_mask, other=0.0)
        b = tl.load(weight_at + block * 128, mask=(outputs[None, :] < num_outputs) & is_channel[:, None], other=0.0)
        a_scales = tl.load(x_scales + rows.to(tl.int64) * num_blocks + block, mask=rows < num_tokens, other=0.0)
        acc += tl.dot(a, b) * (a_scales * tl.load(scale_at + block))[:, None]
    out_at = out + (split * num_tokens + rows[:, None]).to(tl.int64) * num_outputs + outputs[None, :]
    mask = (rows[:, None] < num_tokens) & (outputs[None, :] < num_outputs)
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_numbers", "num_splits"])
def _sum_splits(partial, out, num_numbers, num_splits, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        acc += tl.load(partial + split * num_numbers + at, mask=at < num_numbers, other=0.0)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=at < num_numbers)
