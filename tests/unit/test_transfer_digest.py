"""The block digest sees what can go wrong, and splits follow both sides' neighbours."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.transfer.digest import DIGEST_BYTES, BlockDigest
from services.transfer.runs import are_consecutive, run_lengths, run_views

SHAPE = (4, 3, 4, 24)


def _pool(dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, generator=generator).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_digest_depends_on_the_content_alone(dtype: torch.dtype) -> None:
    pool = _pool(dtype)
    pool[3] = pool[1]
    digest = BlockDigest(pool)
    assert digest.of([1]) == digest.of([3]) == BlockDigest(pool.clone()).of([0, 1])[DIGEST_BYTES:]


def test_digest_is_the_same_in_every_version() -> None:
    pool = torch.arange(2 * 3 * 4 * 24, dtype=torch.uint8).view(2, 3, 4, 24)
    assert BlockDigest(pool).of([0, 1]).hex() == ("70f2cf01360c5e8e2759cc12f6beb00df0c19f67403dbece078267e218f6a593")


@given(st.integers(0, 3 * 4 * 24 - 1), st.integers(0, 7))
@settings(deadline=None)
def test_digest_sees_every_flipped_bit(position: int, bit: int) -> None:
    pool = _pool(torch.uint8)
    before = BlockDigest(pool).of([2])
    pool[2].view(-1)[position] ^= 1 << bit
    assert BlockDigest(pool).of([2]) != before


@given(st.lists(st.integers(0, 3 * 4 * 3 - 1), min_size=2, max_size=2, unique=True), st.integers(0, 7))
@settings(deadline=None)
def test_digest_sees_bits_flipped_in_two_rows_and_words_swapped(words: list[int], byte: int) -> None:
    pool = _pool(torch.uint8)
    before = BlockDigest(pool).of([2])
    bytes_W8 = pool[2].view(-1, 8)
    swapped, flipped = bytes_W8.clone(), bytes_W8.clone()
    swapped[words] = swapped[words[::-1]]
    for word in words:
        flipped[word, byte] ^= 128
    bytes_W8.copy_(swapped)
    assert BlockDigest(pool).of([2]) != before
    if words[0] // 3 != words[1] // 3:
        bytes_W8.copy_(flipped)
        assert BlockDigest(pool).of([2]) != before


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 12, 24])
def test_digest_takes_rows_of_any_width(width: int) -> None:
    pool = _pool(torch.uint8, (2, 2, 3, width))
    before = BlockDigest(pool).of([0, 1])
    pool[1, 1, 2, width - 1] += 1
    after = BlockDigest(pool).of([0, 1])
    assert before[:DIGEST_BYTES] == after[:DIGEST_BYTES]
    assert before[DIGEST_BYTES:] != after[DIGEST_BYTES:]


@given(st.permutations(range(8)), st.permutations(range(8)))
@settings(deadline=None)
def test_runs_are_neighbours_on_both_sides_and_cover_all_blocks(left: list[int], right: list[int]) -> None:
    lengths = run_lengths(left, right)
    assert sum(lengths) == 8
    assert are_consecutive(left, lengths)
    assert are_consecutive(right, lengths)
    pool = torch.arange(8).view(8, 1, 1, 1)
    assert torch.cat(run_views(pool, left, lengths)).flatten().tolist() == left


def test_runs_are_as_long_as_both_sides_allow() -> None:
    assert run_lengths([3, 4, 5, 6], [0, 1, 5, 6]) == (2, 2)
    assert run_lengths([3, 4, 5, 6], None) == (1, 1, 1, 1)
    assert not are_consecutive([3, 5, 4, 6], (4,))
