"""Latent attention on CUDA: the kernels read the blocks themselves, whatever the steps mix.

Shapes: T tokens of the batch, H heads, N nope, R rope, V value, C latent, B sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.attention import LatentAttention, Projections
from services.engine.batch import Batch, DecodeTables
from services.engine.config import ModelConfig
from services.engine.kernels.mla_decode import mla_decode
from services.engine.kv_cache import KVCache
from services.engine.rotary import softmax_scale


class CudaLatentAttention:
    """Cache of latents: one-token chunks straight from the blocks, longer ones as on a CPU."""

    def __init__(self, config: ModelConfig, cache: KVCache) -> None:
        self._cache = cache
        self._rank = config.kv_lora_rank
        self._scale = softmax_scale(config)
        self._by_chunks = LatentAttention(config, cache)

    def attend(self, layer: int, projections: Projections, q: Tensor, latents: Tensor, batch: Batch) -> Tensor:
        """See `Attention.attend`."""
        if batch.decode is None:
            return self._by_chunks.attend(layer, projections, q, latents, batch)
        self._cache.write(layer, batch.blocks, batch.offsets, latents)
        return self._decode(layer, projections, q, batch.decode)

    def _decode(self, layer: int, projections: Projections, q: Tensor, tables: DecodeTables) -> Tensor:
        """One token of each sequence, all at once: q [B, H, N+R] to [B, H, V], straight from the blocks."""
        key_weights, value_weights = projections.absorb_weights()
        nope = key_weights.shape[1]
        q_latent = torch.bmm(q[..., :nope].transpose(0, 1), key_weights).transpose(0, 1)
        u = mla_decode(
            torch.cat((q_latent, q[..., nope:]), dim=-1),
            self._cache.pool[:, layer],
            tables.block_tables,
            tables.context_lens,
            self._scale,
            self._rank,
            tables.max_context_len,
        )
        return torch.bmm(u.transpose(0, 1), value_weights).transpose(0, 1)
