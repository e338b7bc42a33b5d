"""What fits into a memory budget, from config.json alone: weights, bytes a token, blocks, sequences by length."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.common.errors import UnsupportedConfig
from services.engine.config import ModelConfig
from services.engine.kv_cache import KVLayout
from services.engine.model import DeepseekForCausalLM

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
# Activations and the libraries' workspaces; what the engine keeps free too.
SPARE_BYTES = 2 * 2**30
LAYOUTS = (("absorb", "auto"), ("absorb", "fp8"), ("naive", "auto"))


@dataclass(frozen=True, slots=True)
class CachePlan:
    """One way to keep the cache. num_blocks: 0 where the weights leave no room. sequences: (length, how many fit)."""

    cache_mode: str
    kv_dtype: str
    bytes_per_token: int
    num_blocks: int
    sequences: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """num_parameters counts the main model; weight_bytes as the engine holds them. left_bytes: for the cache."""

    num_parameters: int
    weight_bytes: int
    left_bytes: int
    caches: tuple[CachePlan, ...]


def plan(
    config: ModelConfig, memory_bytes: int, dtype: torch.dtype, *, block_size: int = 16, max_seq_len: int | None = None
) -> Plan:
    """What fits. max_seq_len is one more length to show; lengths beyond the model's own limit are left out."""
    model = DeepseekForCausalLM(config, dtype, "meta", keeps_fp8=config.is_fp8)
    num_parameters = sum(each.numel() for name, each in model.named_parameters() if "scale" not in name)
    weight_bytes = sum(each.numel() * each.element_size() for each in model.parameters())
    left_bytes = memory_bytes - weight_bytes - SPARE_BYTES
    lengths = {n for n in LENGTHS if n <= config.max_position_embeddings}
    if max_seq_len is not None:
        lengths.add(max_seq_len)
    caches = []
    for cache_mode, kv_dtype in LAYOUTS:
        name = str(dtype).removeprefix("torch.") if kv_dtype == "auto" else kv_dtype
        try:
            layout = KVLayout.of(config, cache_mode, name, block_size)
        except UnsupportedConfig:
            continue  # an fp8 cache needs a rank that is a multiple of 128
        num_blocks = max(0, left_bytes // layout.bytes_per_block)
        sequences = tuple((n, num_blocks // -(-n // block_size)) for n in sorted(lengths))
        caches.append(CachePlan(cache_mode, name, layout.bytes_per_token, num_blocks, sequences))
    return Plan(num_parameters, weight_bytes, left_bytes, tuple(caches))
