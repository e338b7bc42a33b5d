"""Computes the chunks of a step on a GPU: mixed steps as they come, decode steps by a graph."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListLike

import torch
from torch import Tensor

from services.engine.device_tables import DeviceTables
from services.engine.fused import FusedModel
from services.engine.graphs import DecodeGraphs
from services.engine.kv_cache import KVCache
from services.engine.model import DeepseekForCausalLM
from services.engine.rotary import RotaryEmbedding
from services.engine.scheduler import Chunk
from services.engine.staging import Staging
from services.engine.step import decode_arrays, is_decode, mixed_step


class FusedRunner:
    """One model on one device, with a cache of latents. Works on a CPU too, through the kernels' references."""

    def __init__(
        self, model: DeepseekForCausalLM, cache: KVCache, max_seq_len: int, max_num_sequences: int, device: torch.device
    ) -> None:
        self.model = model
        self.cache = cache
        self.device = device
        self._fused = FusedModel(model, cache, RotaryEmbedding(model.config, max_seq_len, device))
        max_blocks = min(-(-max_seq_len // cache.layout.block_size), cache.pool.shape[0])
        self._tables = DeviceTables(max_num_sequences, max_blocks, device)
        self._staging = Staging(device)
        self._sampled_ids = torch.zeros(max_num_sequences, dtype=torch.int32, device=device)
        self._graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def capture_graphs(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Makes the graphs of decode steps and returns their number. progress: called with (done, in all)."""
        self._graphs = DecodeGraphs(
            self._fused,
            self._tables,
            self._sampled_ids,
            self.model.config.vocab_size,
            len(self._sampled_ids),
            self.cache.compute_dtype,
            progress,
        )
        return self._graphs.num_sizes

    @torch.inference_mode()
    def run(self, chunks: ListLike[Chunk]) -> Tensor:
        """Logits in order of the chunks, [rows, vocab]: all rows of a chunk that wants prompt logprobs, else those that
        are sampled from. Valid until the next call."""
        layout = self.cache.layout
        if self._graphs is not None and is_decode(chunks):
            return self._graphs.run(decode_arrays(chunks, self._tables, layout.block_size), self._staging)
        step = mixed_step(chunks, self._tables, layout, self._staging, self.cache.compute_dtype)
        return self._fused(step, self._sampled_ids)
