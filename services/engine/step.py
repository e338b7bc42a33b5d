"""What one step computes, as tensors on the device.

The chunks are laid one after another, short ones first: each of their tokens is a row of its own, that attends straight
from the blocks. Then long ones, whose sequences are expanded to keys and values of all heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from services.engine.batch import wants_all_logits
from services.engine.device_tables import DeviceTables
from services.engine.kernels.mla_prefill import PrefillWork
from services.engine.scheduler import Chunk
from services.engine.staging import Staging


@dataclass(frozen=True, slots=True)
class LongChunks:
    """The chunks that are expanded. cu_q, cu_k: bounds of their queries, among the step's tokens, and of their keys.

    key_slots: int32 [keys], where their keys' latents are; None if the queries' own are all there is, unchanged.
    num_keys: int32 [1], how many of them there are; None: all. A captured step has its bounds in `work` alone.
    """

    cu_q: list[int]
    cu_k: list[int]
    key_slots: Tensor | None
    num_keys: Tensor | None
    work: PrefillWork


@dataclass(frozen=True, slots=True)
class Step:
    """token_ids (negative: sampled by the last step, see `embed_tokens`), positions, slots: int32 [T].

    The first R tokens are rows: context_lens int32 [R], block_tables int32 [R, max_blocks]; max_context_len bounds the
    lengths. logits_rows: int64, the tokens whose logits are wanted, None for all.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_context_len: int | None
    long: LongChunks | None
    logits_rows: Tensor | None

    @property
    def num_rows(self) -> int:
        """R."""
        return self.context_lens.shape[0]


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A step before it is sent. table_rows: the rows of `DeviceTables` [R]; places, ids: see DeviceTables.rows_of."""

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    context_lens: np.ndarray
    table_rows: np.ndarray
    places: np.ndarray
    ids: np.ndarray

    def inputs(self) -> dict[str, np.ndarray]:
        """What the forward pass reads, in a fixed order."""
        return {
            "token_ids": self.token_ids,
            "positions": self.positions,
            "slots": self.slots,
            "context_lens": self.context_lens,
            "table_rows": self.table_rows,
        }

    def updates(self) -> dict[str, np.ndarray]:
        """What goes to the block tables before."""
        return {"places": self.places, "ids": self.ids} if len(self.places) else {}

    def padded(self, num_tokens: int, num_rows: int) -> StepArrays:
        """With tokens that store nothing, and rows of length 0."""
        more_tokens, more_rows = num_tokens - len(self.token_ids), num_rows - len(self.context_lens)

        def pad(array: np.ndarray, missing: int, value: int = 0) -> np.ndarray:
            return np.concatenate((array, np.full(missing, value, array.dtype))) if missing else array

        return replace(
            self,
            token_ids=pad(self.token_ids, more_tokens),
            positions=pad(self.positions, more_tokens),
            slots=pad(self.slots, more_tokens, -1),
            context_lens=pad(self.context_lens, more_rows),
            table_rows=pad(self.table_rows, more_rows),
        )


def is_decode(chunks: ListLike[Chunk]) -> bool:
    """Whether every chunk is one token whose logits are wanted."""
    return all(chunk.num_tokens == 1 and chunk.samples and not wants_all_logits(chunk) for chunk in chunks)


def decode_arrays(
    chunks: ListLike[Chunk], tables: DeviceTables, block_size: int, sampled_rows: ListLike[int] | None = None
) -> StepArrays:
    """A step of one token a chunk. sampled_rows: by chunk, where the last step sampled its token."""
    rows, places, ids = tables.rows_of([chunk.seq for chunk in chunks])
    positions = np.array([chunk.start for chunk in chunks], np.int32)
    blocks = np.array([chunk.seq.block_table[chunk.start // block_size] for chunk in chunks], np.int32)
    if sampled_rows is None:
        token_ids = np.array([chunk.seq.token_ids[chunk.start] for chunk in chunks], np.int32)
    else:
        token_ids = -1 - np.array(sampled_rows, np.int32)
    slots = blocks * block_size + positions % block_size
    return StepArrays(token_ids, positions, slots, positions + 1, rows, places, ids)


def decode_step(
    arrays: StepArrays, tables: DeviceTables, block_size: int, staging: Staging, more: dict[str, np.ndarray]
) -> tuple[Step, dict[str, Tensor]]:
    """A step of rows alone, and `more` arrays sent along with it."""
    sent = staging.send(arrays.updates() | arrays.inputs() | more)
    return rows_step(arrays, sent, tables, block_size), sent


def rows_step(arrays: StepArrays, sent: Mapping[str, Tensor], tables: DeviceTables, block_size: int) -> Step:
    """The step of arrays that were sent; what is new of the block tables is written first."""
    if len(arrays.places):
        tables.write(sent["places"], sent["ids"])
    longest = int(arrays.context_lens.max()) if len(arrays.context_lens) else 0
    return Step(
        sent["token_ids"],
        sent["positions"],
        sent["slots"],
        sent["context_lens"],
        tables.tensor[:, : -(-longest // block_size)].index_select(0, sent["table_rows"]),
        longest,
        None,
        None,
    )
