"""Which tokens of a step become rows, and which are expanded."""

from __future__ import annotations

import pytest
import torch

from services.common.prefix_hash import PrefixHasher
from services.common.sampling import SamplingParams
from services.engine.device_tables import DeviceTables
from services.engine.mixed_step import AttentionCut, MixedArrays, mixed_arrays
from services.engine.scheduler import Chunk
from services.engine.sequence import Sequence

CUT = AttentionCut(num_heads=2, num_sms=4, dtype=torch.float32, reads_back=False)
BLOCK_SIZE = 8


def arrays_of(sizes: list[int]) -> MixedArrays:
    """Of new prompts with so many tokens, whose blocks lie one after another; token t of prompt i is 100 * i + t."""
    chunks, next_block = [], 0
    for i, size in enumerate(sizes):
        token_ids = [100 * i + t for t in range(size)]
        seq = Sequence(str(i), token_ids, SamplingParams(), PrefixHasher(b"", BLOCK_SIZE), eos_token_ids=frozenset())
        num_blocks = -(-size // BLOCK_SIZE)
        seq.block_table = list(range(next_block, next_block + num_blocks))
        next_block += num_blocks
        chunks.append(Chunk(seq, 0, size))
    tables = DeviceTables(len(sizes), 16, torch.device("cpu"))
    return mixed_arrays(chunks, tables, BLOCK_SIZE, CUT, always_reads=True)


@pytest.mark.parametrize("sizes", [[1], [40], [16, 1, 17, 2], [16] * 30, [1] * 300 + [5, 60], [3, 90] * 60])
def test_every_token_is_a_row_or_expanded(sizes: list[int]) -> None:
    arrays = arrays_of(sizes)
    rows, long = arrays.rows, arrays.long
    num_rows = len(rows.context_lens)
    assert sorted(rows.token_ids.tolist()) == sorted(100 * i + t for i, size in enumerate(sizes) for t in range(size))
    assert num_rows >= sizes.count(1)
    assert num_rows <= max(256, sizes.count(1))
    bounds = [num_rows] if long is None else long.cu_q
    assert (bounds[0], bounds[-1]) == (num_rows, sum(sizes))
    # The logits asked for are those of each prompt's last token, in the order of the prompts.
    asked = [100 * i + size - 1 for i, size in enumerate(sizes)]
    assert rows.token_ids[arrays.logits_rows].tolist() == asked


def test_slots_and_keys_are_where_the_blocks_are() -> None:
    arrays = arrays_of([20, 3])
    assert arrays.rows.slots.tolist() == [24, 25, 26, *range(20)]
    assert arrays.long is not None
    assert arrays.long.key_slots is not None
    assert arrays.long.key_slots.tolist() == list(range(20))
    assert arrays.long.counts[:2].tolist() == [20, 2]


def test_what_a_step_is_padded_with_stores_nothing() -> None:
    rows = arrays_of([4, 1]).rows.padded(12, 9)
    assert rows.slots.tolist()[5:] == [-1] * 7
    assert rows.context_lens.tolist()[5:] == [0] * 4
    assert {len(rows.token_ids), len(rows.positions), len(rows.slots)} == {12}
    assert {len(rows.context_lens), len(rows.table_rows)} == {9}
