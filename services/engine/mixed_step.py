"""Steps of any chunks: which of their tokens are rows, which are expanded, and what is sent of them to the device."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from services.engine.batch import wants_all_logits
from services.engine.device_tables import DeviceTables
from services.engine.kernels.mla_prefill import PrefillWork, is_split, query_tiles, work_counts
from services.engine.scheduler import Chunk
from services.engine.staging import Staging
from services.engine.step import LongChunks, Step, StepArrays, rows_step

# Up to here reading the latents once a token costs less than expanding them.
MAX_SHORT_TOKENS = 16
# Rows of chunks that are longer than a token; what has no room is expanded. Kernels are compiled by powers of two of
# the rows: with more of them one would be compiled while somebody waits.
MAX_ROWS = 256


@dataclass(frozen=True, slots=True)
class LongArrays:
    """Long chunks before they are sent: see `LongChunks`, `query_tiles` and `work_counts`.

    key_slots: None where the queries' own latents are all there is.
    """

    cu_q: list[int]
    cu_k: list[int]
    tiles: np.ndarray
    counts: np.ndarray
    key_slots: np.ndarray | None

    def inputs(self) -> dict[str, np.ndarray]:
        """What the forward pass reads."""
        slots = {} if self.key_slots is None else {"key_slots": self.key_slots}
        return {"tiles": self.tiles, "counts": self.counts} | slots


@dataclass(frozen=True, slots=True)
class MixedArrays:
    """A step of any chunks before it is sent. rows: of its short chunks; their tokens, then those of the long ones."""

    rows: StepArrays
    long: LongArrays | None
    logits_rows: np.ndarray


@dataclass(frozen=True, slots=True)
class AttentionCut:
    """What attention is cut by: the model's heads, the card's multiprocessors, the numbers that are computed with.

    reads_back: what is stored differs from what was computed, so that keys are always read from the blocks.
    """

    num_heads: int
    num_sms: int
    dtype: torch.dtype
    reads_back: bool


def mixed_arrays(
    chunks: ListLike[Chunk], tables: DeviceTables, block_size: int, cut: AttentionCut, *, always_reads: bool = False
) -> MixedArrays:
    """A step of any chunks. always_reads: even keys that are all the step's own are to be read from the blocks.

    Logits: every row of a chunk that wants prompt logprobs, else the sampled ones, in the order of the chunks.
    """
    table_rows, places, ids = tables.rows_of([chunk.seq for chunk in chunks])
    order, num_short = _rows_first(chunks)
    token_ids: list[int] = []
    starts = [0] * len(chunks)
    for i in order:
        chunk = chunks[i]
        starts[i] = len(token_ids)
        token_ids += chunk.seq.token_ids[chunk.start : chunk.start + chunk.num_tokens]
    ordered = [chunks[i] for i in order]
    positions = np.concatenate([_positions(chunk) for chunk in ordered])
    slots = np.concatenate([_slots(chunk, _positions(chunk), block_size) for chunk in ordered])
    num_rows = sum(chunk.num_tokens for chunk in ordered[:num_short])
    rows = np.repeat(table_rows[order[:num_short]], [chunk.num_tokens for chunk in ordered[:num_short]])
    arrays = StepArrays(
        np.array(token_ids, np.int32), positions, slots, positions[:num_rows] + 1, rows.astype(np.int32), places, ids
    )
    long = _long_arrays(ordered[num_short:], num_rows, block_size, cut, always_reads) if ordered[num_short:] else None
    return MixedArrays(arrays, long, _logits_rows(chunks, starts))


def _rows_first(chunks: ListLike[Chunk]) -> tuple[list[int], int]:
    """The chunks' places, those whose tokens become rows first, and how many those are."""
    short = [i for i, chunk in enumerate(chunks) if chunk.num_tokens <= MAX_SHORT_TOKENS]
    rows: list[int] = []
    num_rows = 0
    for i in sorted(short, key=lambda i: chunks[i].num_tokens):
        num_rows += chunks[i].num_tokens
        if num_rows > MAX_ROWS and chunks[i].num_tokens > 1:
            break
        rows.append(i)
    return rows + sorted(set(range(len(chunks))).difference(rows)), len(rows)


def mixed_step(
    arrays: MixedArrays, tables: DeviceTables, block_size: int, staging: Staging, more: dict[str, np.ndarray]
) -> tuple[Step, dict[str, Tensor]]:
    """The step, and `more` arrays sent along with it."""
    long = arrays.long
    extra = {"logits_rows": arrays.logits_rows} | (long.inputs() if long is not None else {})
    sent = staging.send(arrays.rows.updates() | arrays.rows.inputs() | extra | more)
    step = replace(rows_step(arrays.rows, sent, tables, block_size), logits_rows=sent["logits_rows"])
    if long is None:
        return step, sent
    work = PrefillWork(sent["tiles"], sent["counts"], is_split(long.counts))
    return replace(step, long=LongChunks(long.cu_q, long.cu_k, sent.get("key_slots"), None, work)), sent


def _positions(chunk: Chunk) -> np.ndarray:
    return np.arange(chunk.start, chunk.start + chunk.num_tokens, dtype=np.int32)


def _slots(chunk: Chunk, positions: np.ndarray, block_size: int) -> np.ndarray:
    table = np.array(chunk.seq.block_table, np.int32)
    slots: np.ndarray = table[positions // block_size] * block_size + positions % block_size
    return slots


def _long_arrays(
    long: ListLike[Chunk], num_rows: int, block_size: int, cut: AttentionCut, always_reads: bool
) -> LongArrays:
    cu_q, cu_k = [num_rows], [0]
    for chunk in long:
        cu_q.append(cu_q[-1] + chunk.num_tokens)
        cu_k.append(cu_k[-1] + chunk.start + chunk.num_tokens)
    tiles = query_tiles(cu_q, cu_k, cut.dtype)
    counts = work_counts(cu_q, cu_k, len(tiles), cut.num_heads, cut.num_sms)
    key_slots = None
    if always_reads or cut.reads_back or any(chunk.start for chunk in long):
        all_positions = [np.arange(chunk.start + chunk.num_tokens, dtype=np.int32) for chunk in long]
        slots = [_slots(chunk, each, block_size) for chunk, each in zip(long, all_positions, strict=True)]
        key_slots = np.concatenate(slots)
    return LongArrays(cu_q, cu_k, tiles, counts, key_slots)


def _logits_rows(chunks: ListLike[Chunk], starts: ListLike[int]) -> np.ndarray:
    rows: list[int] = []
    for chunk, start in zip(chunks, starts, strict=True):
        if wants_all_logits(chunk):
            rows += range(start, start + chunk.num_tokens)
        elif chunk.samples:
            rows.append(start + chunk.num_tokens - 1)
    return np.array(rows, np.int64)
