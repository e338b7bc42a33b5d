"""What one step computes, as tensors: the chunks of several sequences laid one after another."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.scheduler import Chunk


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """One sequence's part of a batch: rows start..start+num_tokens-1.

    context_len: its tokens up to and including these. block_ids: int64, the blocks that hold them.
    """

    start: int
    num_tokens: int
    context_len: int
    block_ids: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """token_ids, positions, blocks, offsets: int64 [T]. logits_rows: int64, the rows whose logits are wanted."""

    token_ids: Tensor
    positions: Tensor
    blocks: Tensor
    offsets: Tensor
    spans: tuple[Span, ...]
    logits_rows: Tensor

    @classmethod
    def of(cls, chunks: ListLike[Chunk], block_size: int, device: torch.device) -> Batch:
        """Lays the chunks out. Every row of a chunk that wants prompt logprobs gets logits, else the sampled ones."""
        token_ids: list[int] = []
        positions: list[int] = []
        logits_rows: list[int] = []
        spans: list[Span] = []
        blocks: list[int] = []
        for chunk in chunks:
            seq, start, end = chunk.seq, chunk.start, chunk.start + chunk.num_tokens
            row = len(token_ids)
            token_ids += seq.token_ids[start:end]
            positions += range(start, end)
            table = seq.block_table
            blocks += [table[position // block_size] for position in range(start, end)]
            held = torch.tensor(table[: -(-end // block_size)], dtype=torch.int64, device=device)
            spans.append(Span(row, chunk.num_tokens, end, held))
            if wants_all_logits(chunk):
                logits_rows += range(row, row + chunk.num_tokens)
            elif chunk.samples:
                logits_rows.append(row + chunk.num_tokens - 1)
        offsets = [position % block_size for position in positions]

        def as_tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            as_tensor(token_ids),
            as_tensor(positions),
            as_tensor(blocks),
            as_tensor(offsets),
            tuple(spans),
            as_tensor(logits_rows),
        )


def wants_all_logits(chunk: Chunk) -> bool:
    """Whether the chunk computes prompt tokens whose logprobs were asked for."""
    return chunk.seq.sampling.prompt_logprobs is not None and chunk.start < chunk.seq.num_prompt_tokens
