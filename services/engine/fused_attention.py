"""Attention of a step in few operations: rows straight from the blocks, long chunks over keys and values made for them.

Shapes: T tokens, R rows of a step, H heads, N nope, V value, C latent, K keys (N + rope in width).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from services.engine.attention import Projections
from services.engine.config import ModelConfig
from services.engine.kernels.expand_latents import expand_latents
from services.engine.kernels.gather_latents import gather_latents
from services.engine.kernels.mla_decode import mla_decode_to_values
from services.engine.kernels.mla_prefill import mla_prefill
from services.engine.kv_cache import KVCache
from services.engine.rotary import softmax_scale
from services.engine.step import LongChunks, Step

# Most memory for the keys and values of one layer; more heads than fit in take turns.
EXPANDED_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Projected:
    """What `mla_store` left of a layer: q [T, H, N+R], latents [T, C+R], absorbed [R, H, C+R]."""

    q: Tensor
    latents: Tensor
    absorbed: Tensor


class FusedAttention:
    """One cache of latents and all the layers that attend to it."""

    def __init__(self, config: ModelConfig, cache: KVCache) -> None:
        self._config = config
        self._cache = cache
        self._scale = softmax_scale(config)

    def attend(self, layer: int, projections: Projections, projected: Projected, step: Step, out: Tensor) -> None:
        """Attends, into out [T, H, V]."""
        q, latents, absorbed = projected.q, projected.latents, projected.absorbed
        num_rows = step.num_rows
        if num_rows:
            _, value_weights = projections.absorb_weights()
            self._attend_rows(layer, value_weights, absorbed[:num_rows], out[:num_rows], step)
        if step.long is not None:
            self._attend_long(layer, projections, q, latents[num_rows:], out, step.long)

    def _attend_rows(self, layer: int, value_weights: Tensor, absorbed: Tensor, out: Tensor, step: Step) -> None:
        mla_decode_to_values(
            absorbed,
            self._cache.pool[:, layer],
            step.block_tables,
            step.context_lens,
            self._scale,
            value_weights,
            out,
            step.max_context_len,
        )

    def _attend_long(
        self, layer: int, projections: Projections, q: Tensor, latents: Tensor, out: Tensor, long: LongChunks
    ) -> None:
        config, rank = self._config, self._config.kv_lora_rank
        if long.key_slots is not None:
            pool = self._cache.pool[:, layer]
            latents = gather_latents(pool, long.key_slots, rank, latents.dtype, long.num_keys)
        latent, rope = latents.split((rank, config.qk_rope_head_dim), dim=-1)
        width = config.qk_nope_head_dim + config.v_head_dim
        bytes_a_head = len(latents) * width * latents.element_size()
        num_heads = min(config.num_attention_heads, max(1, EXPANDED_BYTES // bytes_a_head))
        weight = projections.kv_b_proj.weight
        for head in range(0, config.num_attention_heads, num_heads):
            part = weight[head * width : (head + num_heads) * width]
            expanded = expand_latents(latent, part, long.num_keys).unflatten(-1, (-1, width))
            keys, values = expanded.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
            heads = slice(head, head + expanded.shape[1])
            mla_prefill(
                q[:, heads], keys, rope, values, self._scale, long.cu_q, long.cu_k, long.work, out[:, heads]
            )  # fmt: skip
