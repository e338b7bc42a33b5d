"""Blocks that lie side by side travel as one piece: few large descriptors beat many small ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def run_lengths(block_ids: Sequence[int], receiver_block_ids: Sequence[int] | None) -> tuple[int, ...]:
    """The coarsest split in which every run is consecutive on both sides.

    With the receiver's ids unknown it is one block a run: the only split that any receiver can take.
    """
    if receiver_block_ids is None:
        return (1,) * len(block_ids)
    lengths: list[int] = []
    for i in range(len(block_ids)):
        if i > 0 and all(ids[i] == ids[i - 1] + 1 for ids in (block_ids, receiver_block_ids)):
            lengths[-1] += 1
        else:
            lengths.append(1)
    return tuple(lengths)


def are_consecutive(block_ids: Sequence[int], lengths: Sequence[int]) -> bool:
    """Whether the block ids are consecutive within each run."""
    start = 0
    for length in lengths:
        if block_ids[start + length - 1] - block_ids[start] != length - 1:
            return False
        if any(block_ids[i + 1] != block_ids[i] + 1 for i in range(start, start + length - 1)):
            return False
        start += length
    return True


def run_views(pool: torch.Tensor, block_ids: Sequence[int], lengths: Sequence[int]) -> list[torch.Tensor]:
    """One view of the pool a run, [run length, num_layers, block_size, width]; the runs must be consecutive."""
    views, start = [], 0
    for length in lengths:
        first = block_ids[start]
        views.append(pool[first : first + length])
        start += length
    return views
