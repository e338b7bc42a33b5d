"""Computes the chunks of a step: batch in, logits out. Owns the model and the KV cache; knows no queue."""

from __future__ import annotations

from collections.abc import Sequence as ListLike

import torch
from torch import Tensor

from services.engine.attention import Attention, LatentAttention, NaiveAttention
from services.engine.batch import Batch
from services.engine.kv_cache import KVCache
from services.engine.model import DeepseekForCausalLM
from services.engine.rotary import RotaryEmbedding
from services.engine.scheduler import Chunk


class Runner:
    """One model on one device."""

    def __init__(self, model: DeepseekForCausalLM, cache: KVCache, max_seq_len: int, device: torch.device) -> None:
        self.model = model
        self.cache = cache
        self.device = device
        self._rotary = RotaryEmbedding(model.config, max_seq_len, device)
        is_naive = cache.layout.cache_mode == "naive"
        self._attention: Attention = (NaiveAttention if is_naive else LatentAttention)(model.config, cache)

    @torch.inference_mode()
    def run(self, chunks: ListLike[Chunk]) -> Tensor:
        """Logits of the rows that Batch.of marks, in order of the chunks: [rows, vocab]."""
        batch = Batch.of(chunks, self.cache.layout.block_size, self.device)
        logits: Tensor = self.model(batch, self._rotary, self._attention)
        return logits
