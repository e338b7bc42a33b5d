import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.common.errors import OutOfBlocks
from services.engine.block_pool import BlockPool


def name(number):
    return number.to_bytes(16, "little")


def cache_chain(pool, first, length):
    """Allocates, commits and releases a chain of blocks named first, first+1, …"""
    table = pool.allocate(length)
    for offset, block_id in enumerate(table):
        pool.commit(block_id, name(first + offset))
    pool.release(table)
    return table


def cache_prefix(pool, numbers):
    """As long-lived as the turn of a sequence with these blocks: those that are held are shared."""
    hashes = [name(number) for number in numbers]
    table = pool.match(hashes)
    pool.acquire(table)
    for index in range(len(table), len(hashes)):
        table += pool.allocate(1)
        pool.commit(table[index], hashes[index], hashes[index - 1] if index else None)
    pool.release(table)
    return hashes


def test_what_is_to_be_evicted_first_goes_from_its_end_and_leaves_what_others_share():
    pool = BlockPool(6, 4)
    staying = cache_prefix(pool, (0, 1, 2))
    going = cache_prefix(pool, (0, 1, 3, 4))
    assert pool.evict_first(going) == 2
    pool.allocate(2)  # one block was free
    assert (len(pool.match(staying)), len(pool.match(going))) == (3, 3)
    pool.allocate(1)
    assert (len(pool.match(staying)), len(pool.match(going))) == (3, 2)
    assert pool.evict_first(going) == 0  # all that is left of it is shared
    assert pool.evict_first(staying) == 3


def test_blocks_in_use_and_those_before_them_keep_their_place():
    pool = BlockPool(6, 4)
    hashes = cache_prefix(pool, (0, 1, 2, 3))
    used = pool.match(hashes)[:3]
    pool.acquire(used)
    assert pool.evict_first(hashes) == 1
    assert pool.evict_first([*hashes, name(9)]) == 1  # the last one is not here
    pool.release(used)
    assert pool.evict_first(hashes) == 4


def test_matches_the_longest_held_prefix_and_changes_nothing():
    pool = BlockPool(6, 4)
    table = cache_chain(pool, 0, 3)
    assert pool.match([name(0), name(1), name(9), name(2)]) == table[:2]
    assert pool.match([name(1)]) == table[1:2]
    assert pool.match([name(9), name(0)]) == []
    assert (pool.num_free_blocks, pool.num_cached_blocks) == (6, 3)
    pool.check_integrity([])


def test_prefers_blocks_without_content_to_cached_ones():
    pool = BlockPool(5, 4)
    cached = cache_chain(pool, 0, 2)
    assert set(pool.allocate(3)).isdisjoint(cached)
    assert pool.num_evictions == 0
    assert set(pool.allocate(2)) == set(cached)
    assert pool.num_evictions == 2
    assert not pool.is_held(name(0))


def test_evicts_the_tail_of_a_chain_before_its_head():
    pool = BlockPool(3, 4)
    cache_chain(pool, 0, 3)
    pool.allocate(1)
    assert list(pool.held_hashes()) == [name(0), name(1)]
    pool.allocate(1)
    assert list(pool.held_hashes()) == [name(0)]


def test_hands_out_what_is_evicted_together_side_by_side():
    pool = BlockPool(num_blocks=8, block_size=4)
    for number, block_id in enumerate(table := pool.allocate(8)):
        pool.commit(block_id, bytes([number]))
    pool.release(table)
    assert pool.allocate(3) == [5, 6, 7]
    assert pool.allocate(5) == [0, 1, 2, 3, 4]


def test_evicts_oldest_unreferenced_block():
    pool = BlockPool(3, 4)
    old, middle, new = (cache_chain(pool, number, 1) for number in range(3))
    pool.acquire(middle)
    pool.acquire(old)
    pool.release(old)  # used again: now newer than `new`
    assert pool.allocate(1) == new
    assert pool.allocate(1) == old
    with pytest.raises(OutOfBlocks):
        pool.allocate(1)
    assert pool.match([name(1)]) == middle


def test_a_refused_allocation_changes_nothing():
    pool = BlockPool(3, 4)
    table = cache_chain(pool, 0, 2)
    with pytest.raises(OutOfBlocks):
        pool.allocate(4)
    assert pool.match([name(0), name(1)]) == table
    assert (pool.num_free_blocks, pool.num_evictions) == (3, 0)


def test_a_shared_block_stays_until_the_last_reference_goes():
    pool = BlockPool(2, 4)
    table = cache_chain(pool, 0, 1)
    pool.acquire(table)
    pool.acquire(table)
    pool.release(table)
    assert pool.num_free_blocks == 1
    pool.check_integrity([table])
    pool.release(table)
    assert pool.num_free_blocks == 2


def test_says_beforehand_whether_blocks_can_be_taken():
    pool = BlockPool(4, 4)
    table = cache_chain(pool, 0, 2)
    assert pool.can_take(table, 2)
    assert not pool.can_take(table, 3)
    pool.acquire(table)
    assert pool.can_take(table, 2)


def test_a_second_block_of_the_same_content_stays_anonymous():
    pool = BlockPool(2, 4)
    first, second = pool.allocate(2)
    pool.commit(first, name(0))
    pool.commit(second, name(0))
    pool.commit(first, name(0))
    assert pool.match([name(0)]) == [first]
    pool.release([first, second])
    assert pool.num_cached_blocks == 1
    pool.check_integrity([])


def test_quarantined_blocks_are_out_of_circulation_until_readmitted():
    pool = BlockPool(3, 4)
    table = pool.allocate(2)
    pool.commit(table[0], name(0))
    pool.quarantine(table)
    assert (pool.num_free_blocks, pool.num_quarantined_blocks) == (1, 2)
    assert not pool.is_held(name(0))
    with pytest.raises(OutOfBlocks):
        pool.allocate(2)
    pool.check_integrity([])
    pool.readmit(table)
    assert len(pool.allocate(3)) == 3


@pytest.mark.parametrize(
    "misuse",
    [
        lambda pool, held, cached, free, away: pool.release([free]),
        lambda pool, held, cached, free, away: pool.release([cached]),
        lambda pool, held, cached, free, away: pool.release([held, held]),
        lambda pool, held, cached, free, away: pool.release([away]),
        lambda pool, held, cached, free, away: pool.acquire([free]),
        lambda pool, held, cached, free, away: pool.acquire([away]),
        lambda pool, held, cached, free, away: pool.commit(free, name(5)),
        lambda pool, held, cached, free, away: pool.commit(held, name(5)),
        lambda pool, held, cached, free, away: pool.quarantine([free]),
        lambda pool, held, cached, free, away: (pool.acquire([held]), pool.quarantine([held])),
        lambda pool, held, cached, free, away: pool.readmit([held]),
    ],
)
def test_breaking_a_rule_of_use_is_an_assertion_error(misuse):
    pool = BlockPool(4, 4)
    held, cached, away = pool.allocate(3)
    pool.commit(held, name(0))
    pool.commit(cached, name(1))
    pool.release([cached])
    pool.quarantine([away])
    free = ({0, 1, 2, 3} - {held, cached, away}).pop()
    with pytest.raises(AssertionError, match="block"):
        misuse(pool, held, cached, free, away)


def test_check_integrity_sees_leaks_and_unknown_tables():
    pool = BlockPool(4, 4)
    table = pool.allocate(2)
    pool.check_integrity([table])
    for tables in ([], [table[:1]], [table, table[:1]], [[table[0], table[0], table[1]]]):
        with pytest.raises(AssertionError):
            pool.check_integrity(tables)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0)])
def test_refuses_an_empty_pool(num_blocks, block_size):
    with pytest.raises(ValueError):
        BlockPool(num_blocks, block_size)


class PoolMachine(RuleBasedStateMachine):
    """Random use of a small pool beside a model that knows only tables and the order of use."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(6, 4)
        self.tables: list[list[int]] = []
        self.hash_of: dict[int, bytes] = {}
        self.cached: list[int] = []  # least recently used first
        self.quarantined: list[int] = []

    def num_references(self, block_id):
        return sum(table.count(block_id) for table in self.tables)

    @rule(num_blocks=st.integers(0, 4))
    def allocate(self, num_blocks):
        num_free = 6 - len({block_id for table in self.tables for block_id in table}) - len(self.quarantined)
        if num_blocks > num_free:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(num_blocks)
            return
        table = self.pool.allocate(num_blocks)
        assert table == sorted(set(table))
        assert len(table) == num_blocks
        assert not any(self.num_references(block_id) or block_id in self.quarantined for block_id in table)
        evicted = self.cached[: max(0, num_blocks - (num_free - len(self.cached)))]
        assert [block_id for block_id in table if block_id in self.cached] == sorted(evicted)
        for block_id in evicted:
            self.cached.remove(block_id)
            del self.hash_of[block_id]
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), number=st.integers(0, 5), previous=st.none() | st.integers(0, 5))
    def commit(self, data, number, previous):
        table = data.draw(st.sampled_from(self.tables))
        for block_id in table[:1]:
            if block_id not in self.hash_of:
                self.pool.commit(block_id, name(number), None if previous is None else name(previous))
                if name(number) not in self.hash_of.values():
                    self.hash_of[block_id] = name(number)

    @rule(numbers=st.lists(st.integers(0, 5), max_size=3, unique=True))
    def match_and_acquire(self, numbers):
        held = {value: block_id for block_id, value in self.hash_of.items()}
        expected: list[int] = []
        for number in numbers:
            if name(number) not in held:
                break
            expected.append(held[name(number)])
        matched = self.pool.match(map(name, numbers))
        assert matched == expected
        self.pool.acquire(matched)
        self.cached = [block_id for block_id in self.cached if block_id not in matched]
        self.tables.append(matched)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        self.cached += [
            block_id for block_id in reversed(table) if block_id in self.hash_of and not self.num_references(block_id)
        ]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def quarantine(self, data):
        table = data.draw(st.sampled_from(self.tables))
        if all(self.num_references(block_id) == 1 for block_id in table):
            self.tables.remove(table)
            self.pool.quarantine(table)
            self.quarantined += table
            for block_id in table:
                self.hash_of.pop(block_id, None)

    @rule()
    def readmit(self):
        self.pool.readmit(self.quarantined)
        self.quarantined = []

    @invariant()
    def books_agree(self):
        self.pool.check_integrity(self.tables)
        assert sorted(self.pool.held_hashes()) == sorted(self.hash_of.values())
        assert self.pool.num_cached_blocks == len(self.hash_of)
        in_use = {block_id for table in self.tables for block_id in table}
        assert self.pool.num_free_blocks == 6 - len(in_use) - len(self.quarantined)


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase
