"""Computes the chunks of a step on a GPU: by a graph, where one holds them, else kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListLike

import numpy as np
import torch
from torch import Tensor

from services.engine.chunk_graphs import ChunkGraphs
from services.engine.device_tables import DeviceTables
from services.engine.fused import FusedModel
from services.engine.fused_attention import EXPANDED_BYTES
from services.engine.graphs import DecodeGraphs, cuts
from services.engine.kernels.draw_tokens import Draws, draw_tokens
from services.engine.kernels.multiprocessors import num_multiprocessors
from services.engine.kv_cache import KVCache
from services.engine.largest_steps import draws_of_all_kinds, largest_steps
from services.engine.mixed_step import AttentionCut, mixed_arrays, mixed_step
from services.engine.model import DeepseekForCausalLM
from services.engine.rotary import RotaryEmbedding
from services.engine.scheduler import Chunk
from services.engine.staging import Staging
from services.engine.step import decode_arrays, decode_step, is_decode

# Launches whose ids are still to be read, and the one being made.
_NUM_FLIGHTS = 3


class FusedRunner:
    """One model on one device, with a cache of latents. Works on a CPU too, through the kernels' references."""

    def __init__(
        self, model: DeepseekForCausalLM, cache: KVCache, max_seq_len: int, max_num_sequences: int, device: torch.device
    ) -> None:
        self.model = model
        self.cache = cache
        self.device = device
        self._fused = FusedModel(model, cache, RotaryEmbedding(model.config, max_seq_len, device))
        self._tables = DeviceTables(max_num_sequences, -(-max_seq_len // cache.layout.block_size), device)
        self._staging = Staging(device)
        self._cut = AttentionCut(
            model.config.num_attention_heads,
            num_multiprocessors(device),
            cache.compute_dtype,
            reads_back=cache.layout.dtype != cache.compute_dtype,
        )
        self._sampled_ids = torch.zeros(max_num_sequences, dtype=torch.int32, device=device)
        self._ids_on_host = [HostIds(max_num_sequences, device) for _ in range(_NUM_FLIGHTS)]
        self._graphs: DecodeGraphs | None = None
        self._chunk_graphs: ChunkGraphs | None = None

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @torch.inference_mode()
    def measure(self, max_num_tokens: int) -> int:
        """Most bytes that steps take besides weights and cache, found by running the largest ones. Stores nothing.

        Compiles what steps launch one by one.
        """
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        for step in largest_steps(max_num_tokens, len(self._sampled_ids), self._cut, self.device):
            logits = self._fused(step, self._sampled_ids)
            draw_tokens(logits, draws_of_all_kinds(logits), self._sampled_ids[: len(logits)])
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        return peak + EXPANDED_BYTES

    @torch.inference_mode()
    def capture_graphs(self, max_num_tokens: int, progress: Callable[[int, int], None] | None = None) -> int:
        """Makes graphs of decode steps and of steps with few tokens, up to max_num_tokens; how many batch sizes.

        progress: called with (done, in all).
        """
        config, dtype, pool = self.model.config, self.cache.compute_dtype, torch.cuda.graph_pool_handle()
        max_rows = len(self._sampled_ids)
        self._graphs = DecodeGraphs(
            self._fused, self._tables, self._sampled_ids, config.vocab_size, max_rows, dtype, pool, progress
        )
        self._chunk_graphs = ChunkGraphs(
            self._fused, self._tables, self._sampled_ids, self._cut, config.hidden_size, max_num_tokens, pool
        )
        return self._graphs.num_sizes

    @torch.inference_mode()
    def run(self, chunks: ListLike[Chunk]) -> Tensor:
        """Logits in order of the chunks, [rows, vocab]: all rows of a chunk that wants prompt logprobs, else those that
        are sampled from. Valid until the next call."""
        logits, _ = self._logits(chunks, {}, None)
        return logits

    @torch.inference_mode()
    def launch(
        self, chunks: ListLike[Chunk], draws: dict[str, np.ndarray], sampled_rows: ListLike[int] | None = None
    ) -> HostIds:
        """Computes the chunks and samples those that sample, in their order, without waiting for it.

        draws: by the names of `Draws`, one entry a sampled token. sampled_rows: for chunks that are ahead, where the
        last launch sampled their tokens. At most two launches at a time may be waited for.
        """
        num_sampled = len(draws["keys"])
        ids = self._sampled_ids[:num_sampled]
        logits, sent = self._logits(chunks, draws, sampled_rows)
        if sent is not None and num_sampled:
            cuts_k, cuts_p = cuts(draws, logits.shape[-1])
            draw_tokens(logits, Draws(**{name: sent[name] for name in draws}), ids, cuts_k=cuts_k, cuts_p=cuts_p)
        self._ids_on_host.append(self._ids_on_host.pop(0))
        return self._ids_on_host[-1].copy(ids)

    def _logits(
        self, chunks: ListLike[Chunk], draws: dict[str, np.ndarray], sampled_rows: ListLike[int] | None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Logits, and what was sent along with the step; None if the tokens are sampled already."""
        block_size = self.cache.layout.block_size
        if is_decode(chunks):
            rows = decode_arrays(chunks, self._tables, block_size, sampled_rows)
            if self._graphs is not None:
                return self._graphs.run(rows, self._staging, draws or None), None
            step, sent = decode_step(rows, self._tables, block_size, self._staging, draws)
            return self._fused(step, self._sampled_ids), sent
        graphs = self._chunk_graphs
        arrays = mixed_arrays(chunks, self._tables, block_size, self._cut, always_reads=graphs is not None)
        if graphs is not None and graphs.takes(arrays):
            sent = self._staging.send(arrays.rows.updates() | {"logits_rows": arrays.logits_rows} | draws)
            if len(arrays.rows.places):
                self._tables.write(sent["places"], sent["ids"])
            return graphs.run(arrays, self._staging, sent["logits_rows"]), sent
        step, sent = mixed_step(arrays, self._tables, block_size, self._staging, draws)
        return self._fused(step, self._sampled_ids), sent


class HostIds:
    """Sampled token ids on their way to the host."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._memory = torch.empty(max_rows, dtype=torch.int32, pin_memory=is_cuda)
        self._is_there = torch.cuda.Event() if is_cuda else None
        self._num_rows = 0

    def copy(self, ids: Tensor) -> HostIds:
        """Begins."""
        self._num_rows = len(ids)
        self._memory[: len(ids)].copy_(ids, non_blocking=True)
        if self._is_there is not None:
            self._is_there.record()
        return self

    def wait(self) -> list[int]:
        """The ids, once the step is through; -1 where the logits were no numbers."""
        if self._is_there is not None:
            self._is_there.synchronize()
        ids: list[int] = self._memory[: self._num_rows].tolist()
        return ids
