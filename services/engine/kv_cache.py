"""The KV cache: one tensor [num_blocks, num_layers, block_size, width], and what a row of it means.

A row is what one token leaves in one layer. Three layouts:
    absorb        latent (C numbers) and rope key (R numbers), shared by all heads
    absorb, fp8   C e4m3 bytes, one fp32 scale each 128 of them, R bf16 numbers: 656 bytes for 512 + 64
    naive         keys (H x (nope + rope)) and values (H x V) of each head
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from services.common.errors import UnsupportedConfig
from services.engine.config import ModelConfig

FP8_GROUP = 128
FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape and meaning of a block. width counts elements of `dtype` (bytes for fp8: dtype is uint8)."""

    cache_mode: str
    kv_dtype: str
    num_layers: int
    block_size: int
    width: int
    dtype: torch.dtype
    kv_lora_rank: int
    qk_rope_head_dim: int
    model_fingerprint: bytes

    @classmethod
    def of(cls, config: ModelConfig, cache_mode: str, kv_dtype: str, block_size: int) -> KVLayout:
        """kv_dtype: float32, bfloat16, float16 or fp8 (absorb only; the rank must be a multiple of 128)."""
        if cache_mode == "naive":
            width = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
        else:
            width = config.kv_lora_rank + config.qk_rope_head_dim
        dtype = torch.uint8 if kv_dtype == "fp8" else getattr(torch, kv_dtype)
        if kv_dtype == "fp8":
            if cache_mode != "absorb":
                raise UnsupportedConfig("kv_dtype", "fp8 needs cache_mode absorb")
            if config.kv_lora_rank % FP8_GROUP:
                raise UnsupportedConfig("kv_lora_rank", f"an fp8 cache needs a multiple of {FP8_GROUP}")
            width = config.kv_lora_rank + 4 * (config.kv_lora_rank // FP8_GROUP) + 2 * config.qk_rope_head_dim
        return cls(
            cache_mode, kv_dtype, config.num_hidden_layers, block_size, width, dtype,
            config.kv_lora_rank, config.qk_rope_head_dim, config.fingerprint,
        )  # fmt: skip

    @property
    def bytes_per_token(self) -> int:
        """All layers together."""
        return self.num_layers * self.width * self.dtype.itemsize

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.block_size

    @property
    def fingerprint(self) -> str:
        """Hex digest; two pools may exchange blocks only if theirs are equal."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:32]


class KVCache:
    """The pool of one engine. In use, `pool` never moves, so it can be registered for transfer."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device, dtype: torch.dtype) -> None:
        self.layout = layout
        self.compute_dtype = dtype
        self._device = device
        self.pool = self._new_pool(num_blocks)

    def resize(self, num_blocks: int) -> None:
        """A new pool, before anything is in it: how large it may be shows once the model has run."""
        self.pool = self._new_pool(0)
        self.pool = self._new_pool(num_blocks)

    def _new_pool(self, num_blocks: int) -> Tensor:
        layout = self.layout
        shape = (num_blocks, layout.num_layers, layout.block_size, layout.width)
        return torch.zeros(shape, dtype=layout.dtype, device=self._device)

    def write(self, layer: int, blocks: Tensor, offsets: Tensor, rows: Tensor) -> None:
        """Stores rows [T, width in numbers] at (block, offset), both int64 [T]."""
        if self.layout.kv_dtype == "fp8":
            rows = pack_fp8(rows, self.layout.kv_lora_rank)
        self.pool[blocks, layer, offsets] = rows.to(self.pool.dtype)

    def read(self, layer: int, block_ids: Tensor, num_tokens: int) -> Tensor:
        """The first num_tokens rows of a block table (int64), [num_tokens, width in numbers], in the compute dtype."""
        rows = self.pool[:, layer].index_select(0, block_ids).flatten(0, 1)[:num_tokens]
        if self.layout.kv_dtype == "fp8":
            return unpack_fp8(rows, self.layout.kv_lora_rank, self.compute_dtype)
        return rows.to(self.compute_dtype)


def pack_fp8(rows: Tensor, rank: int) -> Tensor:
    """[T, C + R] numbers to [T, bytes]: scale = amax / 448 of each 128 latent numbers (FlashMLA's V3.2 record)."""
    latent, rope_key = rows[:, :rank].float(), rows[:, rank:]
    groups = latent.unflatten(-1, (-1, FP8_GROUP))
    scales = groups.abs().amax(-1).clamp_min(1e-4) / FP8_MAX
    quantised = (groups / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(-2)
    parts = (quantised.view(torch.uint8), scales.view(torch.uint8), rope_key.to(torch.bfloat16).view(torch.uint8))
    return torch.cat(parts, dim=-1)


def unpack_fp8(rows: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """The inverse of pack_fp8, up to rounding: [T, bytes] to [T, C + R] of `dtype`."""
    scales_end = rank + 4 * (rank // FP8_GROUP)
    latent = rows[:, :rank].contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (-1, FP8_GROUP))
    scales = rows[:, rank:scales_end].contiguous().view(torch.float32)
    rope_key = rows[:, scales_end:].contiguous().view(torch.bfloat16)
    return torch.cat(((latent * scales.unsqueeze(-1)).flatten(-2).to(dtype), rope_key.to(dtype)), dim=-1)
