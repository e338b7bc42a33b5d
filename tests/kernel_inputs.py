"""Random inputs of the kernels, for their tests and their bench."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from services.engine.kernels.fp8_linear import dequantize


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """|out - expected| / |expected| over all numbers, in float64; NaN where a number is NaN."""
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def decode_inputs(
    lengths: list[int],
    num_heads: int,
    latent: int,
    rope: int,
    block_size: int,
    dtype: torch.dtype,
    device: str = "cpu",
    num_layers: int = 3,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, one layer of a pool whose blocks are dealt at random, block tables (the rest is an invalid id), lengths."""
    num_blocks = [-(-length // block_size) for length in lengths]
    pool = torch.randn(sum(num_blocks) + 2, num_layers, block_size, latent + rope, device=device, dtype=dtype)
    ids = list(range(len(pool)))
    random.Random(len(lengths)).shuffle(ids)
    tables = torch.full((len(lengths), max(num_blocks) + 1), 2**30, dtype=torch.int32)
    for row, count in enumerate(num_blocks):
        tables[row, :count] = torch.tensor([ids.pop() for _ in range(count)], dtype=torch.int32)
    q = torch.randn(len(lengths), num_heads, latent + rope, device=device, dtype=dtype)
    return q, pool[:, num_layers - 1], tables.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)


def pack_latents(latents: torch.Tensor, kv_lora_rank: int) -> torch.Tensor:
    """[..., C + R] to uint8 records of the FP8 layout."""
    blocks = latents[..., :kv_lora_rank].float().unflatten(-1, (-1, min(128, kv_lora_rank)))
    scales = blocks.abs().amax(-1).clamp(min=1e-4) / 448
    quantized = (blocks / scales.unsqueeze(-1)).flatten(-2).to(torch.float8_e4m3fn)
    rope = latents[..., kv_lora_rank:].to(torch.bfloat16).contiguous()
    return torch.cat([part.view(torch.uint8) for part in (quantized, scales, rope)], dim=-1)


def fp8_weight(rows: int, columns: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] e4m3 and fp32 scales of its 128 x 128 blocks, all different."""
    weight = (torch.randn(rows, columns, device=device) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = (torch.rand(-(-rows // 128), -(-columns // 128), device=device) + 0.5) / 60 / columns**0.5
    return weight, scales


@dataclass(frozen=True)
class Fp8Experts:
    """Block-scaled experts; gate and up have row blocks of their own."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor
    down_scale: torch.Tensor

    def exact_gate_up(self, expert: int) -> torch.Tensor:
        """[2M, D] float64."""
        matrices = zip(self.gate_up[expert].chunk(2), self.gate_up_scale[expert].chunk(2), strict=True)
        return torch.cat([dequantize(matrix, scales, torch.float64) for matrix, scales in matrices])

    def exact_down(self, expert: int) -> torch.Tensor:
        """[D, M] float64."""
        return dequantize(self.down[expert], self.down_scale[expert], torch.float64)


def fp8_experts(num_experts: int, width: int, model: int, device: str = "cpu") -> Fp8Experts:
    """Random experts of M = width, D = model."""
    gates = [fp8_weight(width, model, device) for _ in range(2 * num_experts)]
    downs = [fp8_weight(model, width, device) for _ in range(num_experts)]
    return Fp8Experts(
        torch.stack([torch.cat([gates[2 * e][0], gates[2 * e + 1][0]]) for e in range(num_experts)]),
        torch.stack([weight for weight, _ in downs]),
        torch.stack([torch.cat([gates[2 * e][1], gates[2 * e + 1][1]]) for e in range(num_experts)]),
        torch.stack([scales for _, scales in downs]),
    )
