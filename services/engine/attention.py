"""Multi-head latent attention (DeepSeek-V2, section 2.1) over paged blocks.

Two paths over the same cache:
    expanded   keys and values of each head are made from the latents: fewer FLOPs a query, for prefill
    absorbed   kv_b_proj is folded into query and output, so all heads share one read of the latents: for decode
Which one a chunk takes follows from its length: expanding the history costs what `absorb_below` queries save.

Shapes: T tokens of the batch, D model, H heads, N nope, R rope, V value, C latent, Q queries of a chunk, S context.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.engine.batch import Batch, Span
from services.engine.config import LATENT_NORM_EPS, ModelConfig
from services.engine.decode_group import DecodeGroup, decode_groups
from services.engine.kv_cache import KVCache
from services.engine.layers import Fp8Linear, Linear, RMSNorm
from services.engine.rotary import rotate, softmax_scale


class Projections(nn.Module):
    """The weights of one attention layer, by the checkpoint's names, and what they compute."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str, *, keeps_fp8: bool) -> None:
        super().__init__()
        self.config = config
        heads, size = config.num_attention_heads, config.hidden_size

        def linear(size_in: int, size_out: int) -> Linear | Fp8Linear:
            if keeps_fp8:
                return Fp8Linear(size_in, size_out, device, rounds_scales=config.rounds_activation_scales)
            return Linear(size_in, size_out, dtype, device)

        if config.q_lora_rank is None:
            self.q_proj = linear(size, heads * config.qk_head_dim)
        else:
            self.q_a_proj = linear(size, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, dtype, device)
            self.q_b_proj = linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = linear(size, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS, dtype, device)
        self.kv_b_proj = Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), dtype, device
        )
        self.o_proj = linear(heads * config.v_head_dim, size)
        self._absorbed: tuple[Tensor, Tensor] | None = None

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, D] to roped queries [T, H, N + R]."""
        config = self.config
        if config.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (config.num_attention_heads, -1))
        nope, rope = q.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        return torch.cat((nope, rotate(rope, cos, sin)), dim=-1)

    def latents(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, D] to [T, C + R]: the normed latent and the roped key that all heads share."""
        config = self.config
        latent, rope = self.kv_a_proj_with_mqa(x).split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        return torch.cat((self.kv_a_layernorm(latent), rotate(rope, cos, sin)), dim=-1)

    def expand(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """[S, C + R] to keys [S, H, N + R] and values [S, H, V]."""
        config = self.config
        latent, rope = latents.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        expanded = self.kv_b_proj(latent).unflatten(-1, (config.num_attention_heads, -1))
        nope, values = expanded.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        rope = rope.unsqueeze(1).expand(-1, config.num_attention_heads, -1)
        return torch.cat((nope, rope), dim=-1), values

    def absorb_weights(self) -> tuple[Tensor, Tensor]:
        """kv_b_proj as key weights [H, N, C] and value weights [H, C, V]."""
        if self._absorbed is not None:
            return self._absorbed
        config = self.config
        by_head = self.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
        keys, values = by_head.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        return keys, values.transpose(1, 2)

    def pack(self) -> None:
        """For a CPU, once the weights are loaded: its batched product would copy these views at every call."""
        keys, values = self.absorb_weights()
        self._absorbed = keys.contiguous(), values.contiguous()


class Attention(Protocol):
    """How queries meet the cache: one implementation a cache mode, and one for CUDA."""

    def attend(self, layer: int, projections: Projections, q: Tensor, latents: Tensor, batch: Batch) -> Tensor:
        """Stores the batch's new rows in the cache and attends. q [T, H, N+R], latents [T, C+R]; returns [T, H, V]."""
        ...


class NaiveAttention:
    """Cache of each head's keys and values: the reference, many times the memory."""

    def __init__(self, config: ModelConfig, cache: KVCache) -> None:
        self._config = config
        self._cache = cache
        self._scale = softmax_scale(config)

    def attend(self, layer: int, projections: Projections, q: Tensor, latents: Tensor, batch: Batch) -> Tensor:
        config, heads = self._config, self._config.num_attention_heads
        keys, values = projections.expand(latents)
        rows = torch.cat((keys.flatten(1), values.flatten(1)), dim=-1)
        self._cache.write(layer, batch.blocks, batch.offsets, rows)
        outputs = []
        for span in batch.spans:
            held = self._cache.read(layer, span.block_ids, span.context_len)
            k, v = held.split((heads * config.qk_head_dim, heads * config.v_head_dim), dim=-1)
            k, v = k.unflatten(-1, (heads, -1)), v.unflatten(-1, (heads, -1))
            outputs.append(causal_attention(_rows(q, span), k, v, self._scale))
        return torch.cat(outputs)


class LatentAttention:
    """Cache of latents: expanded for long chunks, absorbed for short ones."""

    def __init__(self, config: ModelConfig, cache: KVCache) -> None:
        self._cache = cache
        self._rank = config.kv_lora_rank
        self._scale = softmax_scale(config)
        self._absorb_below = absorb_below(config)
        self._latest: tuple[Batch, _Paths] | None = None

    def attend(self, layer: int, projections: Projections, q: Tensor, latents: Tensor, batch: Batch) -> Tensor:
        self._cache.write(layer, batch.blocks, batch.offsets, latents)
        paths = self._paths_of(batch)
        out = q.new_empty(*q.shape[:2], projections.config.v_head_dim)
        if paths.absorbed_sizes:
            out[paths.absorbed_rows] = self._absorbed(layer, projections, q[paths.absorbed_rows], paths)
        for span in paths.expanded:
            keys, values = projections.expand(self._held(layer, latents, span))
            _rows(out, span).copy_(causal_attention(_rows(q, span), keys, values, self._scale))
        return out

    def _paths_of(self, batch: Batch) -> _Paths:
        """The same for all layers of a step."""
        if self._latest is None or self._latest[0] is not batch:
            self._latest = batch, _Paths.of(batch.spans, self._cache.layout.block_size, self._absorb_below)
        return self._latest[1]

    def _held(self, layer: int, latents: Tensor, span: Span) -> Tensor:
        """The latents of a sequence [S, C+R], read back from the cache unless they are the batch's own, unchanged."""
        if span.num_tokens == span.context_len and self._cache.layout.dtype == latents.dtype:
            return _rows(latents, span)
        return self._cache.read(layer, span.block_ids, span.context_len)

    def _absorbed(self, layer: int, projections: Projections, q: Tensor, paths: _Paths) -> Tensor:
        """Multi-query attention in latent space, q [T', H, N+R] to [T', H, V]; weights are read once for all spans."""
        key_weights, value_weights = projections.absorb_weights()
        nope = key_weights.shape[1]
        q_latent = torch.bmm(q[..., :nope].transpose(0, 1), key_weights).transpose(0, 1)
        q_full = torch.cat((q_latent, q[..., nope:]), dim=-1)
        by_part = q_full.split(paths.absorbed_sizes)
        attended = [
            self._single_queries(layer, part, group) for part, group in zip(by_part, paths.groups, strict=False)
        ]
        for part, span in zip(by_part[len(attended) :], paths.chunks, strict=True):
            attended.append(self._many_queries(part, self._cache.read(layer, span.block_ids, span.context_len)))
        u = attended[0] if len(attended) == 1 else torch.cat(attended)
        return torch.bmm(u.transpose(0, 1), value_weights).transpose(0, 1)

    def _single_queries(self, layer: int, q: Tensor, group: DecodeGroup) -> Tensor:
        """One query of each span, q [B, H, C+R] to [B, H, C]."""
        num_rows = group.bias.numel()
        held = self._cache.read(layer, group.block_ids, num_rows)
        held.index_fill_(0, group.padding, 0)  # what another sequence left there may be NaN, and 0 x NaN is NaN
        held = held.unflatten(0, (q.shape[0], -1))
        scores: Tensor = torch.bmm(q, held.transpose(1, 2)).float().mul_(self._scale).add_(group.bias)
        return torch.bmm(scores.softmax(dim=-1).to(held.dtype), held[..., : self._rank])

    def _many_queries(self, q: Tensor, held: Tensor) -> Tensor:
        """The last Q positions of one sequence, q [Q, H, C+R] over held [S, C+R]: [Q, H, C]."""
        scores: Tensor = (q.flatten(0, 1) @ held.T).float().unflatten(0, q.shape[:2]) * self._scale
        mask = _causal_mask(q.shape[0], held.shape[0], held.device)
        scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf")).flatten(0, 1)
        u: Tensor = scores.softmax(dim=-1).to(held.dtype) @ held[:, : self._rank]
        return u.view(*q.shape[:2], -1)


@dataclass(frozen=True, slots=True, eq=False)
class _Paths:
    """Which span takes which path. Absorbed are the groups, then the chunks.

    absorbed_rows: the batch's rows of both in that order, int64 [T'], or a slice of all. absorbed_sizes: of each part.
    """

    groups: ListLike[DecodeGroup]
    chunks: ListLike[Span]
    expanded: ListLike[Span]
    absorbed_rows: Tensor | slice
    absorbed_sizes: list[int]

    @classmethod
    def of(cls, spans: ListLike[Span], block_size: int, absorb_below: int) -> _Paths:
        groups = decode_groups([span for span in spans if span.num_tokens == 1], block_size)
        chunks = [span for span in spans if 1 < span.num_tokens < absorb_below]
        expanded = [span for span in spans if span.num_tokens > 1 and span.num_tokens >= absorb_below]
        absorbed = [span for group in groups for span in group.spans] + chunks
        rows = [row for span in absorbed for row in range(span.start, span.start + span.num_tokens)]
        is_whole = not expanded and rows == sorted(rows)
        return cls(
            groups,
            chunks,
            expanded,
            slice(None) if is_whole else torch.tensor(rows, dtype=torch.int64, device=spans[0].block_ids.device),
            [len(group.spans) for group in groups] + [span.num_tokens for span in chunks],
        )


def absorb_below(config: ModelConfig) -> int:
    """Queries up to which absorbing costs fewer FLOPs than expanding the context.

    A context token costs C(N+V) to expand and N+R+V a query after that, or 2C+R a query absorbed (per head, times 2).
    """
    saved = 2 * config.kv_lora_rank - config.qk_nope_head_dim - config.v_head_dim
    if saved <= 0:
        return 2**31
    return max(2, config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim) // saved)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [Q, H, N+R] are the last Q of S positions; k [S, H, N+R], v [S, H, V]. Returns [Q, H, V]."""
    value_dim = v.shape[-1]
    if q.device.type == "cpu":
        v = F.pad(v, (0, q.shape[-1] - value_dim)) if value_dim < q.shape[-1] else v  # the fused kernel wants it equal
    q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in (q, k, v))
    is_whole = q.shape[2] == k.shape[2]
    mask = None if is_whole or q.shape[2] == 1 else _causal_mask(q.shape[2], k.shape[2], q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_whole and q.shape[2] > 1, scale=scale)
    return out[0, :, :, :value_dim].transpose(0, 1)


def _causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """[Q, S] bool: the last query sees everything, the one before one less, and so on."""
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return ones.tril_(num_keys - num_queries)


def _rows(x: Tensor, span: Span) -> Tensor:
    return x[span.start : span.start + span.num_tokens]
