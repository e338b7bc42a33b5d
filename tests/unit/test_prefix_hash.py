import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidRequest
from services.common.prefix_hash import PREFIX_HASH_BYTES, PrefixHasher

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_hashes_full_blocks_only():
    hasher = PrefixHasher(b"model", 4)
    assert hasher.hashes([1, 2, 3]) == []
    assert [len(value) for value in hasher.hashes(range(11))] == [PREFIX_HASH_BYTES] * 2


def test_same_block_after_another_prefix_has_another_hash():
    hasher = PrefixHasher(b"model", 2)
    same, other = hasher.hashes([1, 2, 7, 8]), hasher.hashes([3, 2, 7, 8])
    assert same[1] != other[1]
    assert hasher.hashes([7, 8, 7, 8])[0] != hasher.hashes([7, 8, 7, 8])[1]


@pytest.mark.parametrize(
    "other",
    [
        PrefixHasher(b"model-2", 2, b"tenant"),
        PrefixHasher(b"model", 2, b"tenant-2"),
        PrefixHasher(b"model", 2),
        PrefixHasher(b"modelt", 2, b"enant"),
        PrefixHasher(b"model", 1, b"tenant"),
        PrefixHasher(b"model", 4, b"tenant"),
    ],
)
def test_hashers_that_differ_in_anything_share_no_hash(other):
    tokens = [5] * 24
    ours = set(PrefixHasher(b"model", 2, b"tenant").hashes(tokens))
    assert len(ours) == 12
    assert ours.isdisjoint(other.hashes(tokens))


def test_same_settings_give_the_same_hashes_in_every_process():
    hashes = PrefixHasher(b"model", 2, b"tenant").hashes([1, 2, 3, 4])
    assert [value.hex() for value in hashes] == ["5f8c0ddd38916ba74c6b1462b9d43bd0", "c3e0eae966b050439dbddf7a5ec5fba5"]


@given(TOKENS, st.integers(1, 5), st.data())
def test_extending_step_by_step_equals_hashing_at_once(tokens, block_size, data):
    hasher = PrefixHasher(b"model", block_size)
    hashes: list[bytes] = []
    for end in sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=5))):
        hasher.extend(hashes, tokens[:end])
    hasher.extend(hashes, tokens)
    assert hashes == hasher.hashes(tokens)


@given(TOKENS, TOKENS, st.integers(1, 4))
def test_hashes_agree_exactly_as_far_as_full_blocks_agree(left, right, block_size):
    hasher = PrefixHasher(b"model", block_size)
    pairs = zip(hasher.hashes(left), hasher.hashes(right), strict=False)
    for index, (one, two) in enumerate(pairs, start=1):
        assert (one == two) == (left[: index * block_size] == right[: index * block_size])


@pytest.mark.parametrize("token_id", [-1, 2**32, 1.5])
def test_refuses_token_ids_that_are_not_unsigned_32_bit_numbers(token_id):
    hashes: list[bytes] = []
    with pytest.raises(InvalidRequest, match="token_ids"):
        PrefixHasher(b"model", 2).extend(hashes, [1, 2, 3, token_id])
    assert hashes == PrefixHasher(b"model", 2).hashes([1, 2])


def test_refuses_a_block_size_below_one():
    with pytest.raises(ValueError, match="block_size"):
        PrefixHasher(b"model", 0)
