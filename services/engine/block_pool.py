"""Who uses which KV block, and which blocks can be found again by prefix hash. Bookkeeping only: no tensor here.

Every block is in exactly one place:

    referenced    by one or more block tables
    cached        unreferenced, findable by its hash, evicted in order of last use
    free          unreferenced, without content that anybody could find
    quarantined   out of circulation: a transfer that was given up may still write to it

A referenced block is findable too, once it is full and committed; until then only its table knows it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from services.common.errors import OutOfBlocks


class BlockPool:
    """Hands out block ids 0..num_blocks-1 by reference counting. Not thread-safe: one thread owns it.

    Breaking a rule of use (releasing what is not held, committing one block twice) raises AssertionError.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks of at least one token, got {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_evictions = 0
        self._num_references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._previous_of: dict[bytes, bytes] = {}  # of a findable block: the hash of the block before it
        self._num_next: Counter[bytes] = Counter()  # findable blocks that come right after a hash
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._quarantined: set[int] = set()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `allocate` could hand out now: unreferenced ones, cached or not."""
        return len(self._free) + len(self._cached)

    @property
    def num_evictable_blocks(self) -> int:
        """Free blocks that can be found by hash, until they are evicted."""
        return len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that can be found by hash, referenced or not."""
        return len(self._block_of)

    @property
    def num_quarantined_blocks(self) -> int:
        """Blocks that are out of circulation."""
        return len(self._quarantined)

    def num_blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def is_held(self, prefix_hash: bytes) -> bool:
        """Whether a block with this hash can be found."""
        return prefix_hash in self._block_of

    def held_hashes(self) -> Iterator[bytes]:
        """All hashes that can be found, in the order of their commits; not to be kept across changes of the pool."""
        return iter(self._block_of)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest held prefix of `hashes`. Changes nothing: `acquire` them before anything else."""
        matched: list[int] = []
        find = self._block_of.get
        for prefix_hash in hashes:
            block_id = find(prefix_hash)
            if block_id is None:
                break
            matched.append(block_id)
        return matched

    def can_take(self, block_ids: Iterable[int], num_new: int) -> bool:
        """Whether acquiring `block_ids` (no repeats) and then allocating `num_new` blocks would succeed."""
        num_references = self._num_references
        return num_new + sum(num_references[block_id] == 0 for block_id in block_ids) <= self.num_free_blocks

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Adds a reference to each block: one that was matched, or one that is referenced already."""
        for block_id in block_ids:
            if self._num_references[block_id] == 0:
                _require(block_id in self._cached, f"block {block_id} holds nothing that could be acquired")
                del self._cached[block_id]
            self._num_references[block_id] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes `num_blocks` blocks without content, each with one reference; evicts cached ones only when it must.

        In rising order: what was evicted together lay side by side, and travels faster so (`transfer/runs.py`).
        Raises OutOfBlocks, with nothing changed.
        """
        if num_blocks > self.num_free_blocks:
            raise OutOfBlocks(f"{num_blocks} KV blocks needed, {self.num_free_blocks} free")
        taken: list[int] = []
        for _ in range(num_blocks):
            block_id = self._free.pop() if self._free else self._evict()
            self._num_references[block_id] = 1
            taken.append(block_id)
        return sorted(taken)

    def commit(self, block_id: int, prefix_hash: bytes, previous_hash: bytes | None = None) -> None:
        """Makes a referenced block findable: it is full, computed, and will never be written again.

        previous_hash: of the block before it; None for the first of a prefix. Where another block holds the hash
        already, that one stays the one to be found and this one anonymous.
        """
        _require(self._num_references[block_id] > 0, f"block {block_id} is committed but nobody's")
        known = self._hash_of[block_id]
        _require(known is None or known == prefix_hash, f"block {block_id} is committed with two hashes")
        if self._block_of.setdefault(prefix_hash, block_id) == block_id and known is None:
            self._hash_of[block_id] = prefix_hash
            if previous_hash is not None:
                self._previous_of[prefix_hash] = previous_hash
                self._num_next[previous_hash] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Drops a reference to each block of a table; of those now unreferenced the later ones are evicted first."""
        for block_id in reversed(block_ids):
            num_left = self._num_references[block_id] - 1
            _require(num_left >= 0, f"block {block_id} is released but nobody's")
            self._num_references[block_id] = num_left
            if num_left == 0:
                if self._hash_of[block_id] is None:
                    self._free.append(block_id)
                else:
                    self._cached[block_id] = None

    def quarantine(self, block_ids: Iterable[int]) -> None:
        """Takes blocks out of circulation, giving up the caller's reference, which must be the only one."""
        for block_id in block_ids:
            num_references = self._num_references[block_id]
            _require(num_references == 1, f"block {block_id} with {num_references} references is quarantined")
            self._drop_hash(block_id)
            self._num_references[block_id] = 0
            self._quarantined.add(block_id)

    def readmit(self, block_ids: Iterable[int]) -> None:
        """Puts quarantined blocks back into circulation: nothing writes to them any more."""
        for block_id in block_ids:
            _require(block_id in self._quarantined, f"block {block_id} is readmitted but not quarantined")
            self._quarantined.remove(block_id)
            self._free.append(block_id)

    def evict_first(self, hashes: Sequence[bytes]) -> int:
        """Makes the unreferenced blocks of a prefix the next to be evicted, the last one first; says how many.

        Those with which another prefix goes on that can be found here keep their place: it would be lost with them.
        All stay findable until then.
        """
        moved: list[int] = []
        num_own_next = 0
        for prefix_hash in reversed(hashes):
            block_id = self._block_of.get(prefix_hash)
            is_shared = self._num_next.get(prefix_hash, 0) > num_own_next
            if is_shared or (block_id is not None and block_id not in self._cached):
                break
            num_own_next = 0 if block_id is None else 1
            if block_id is not None:
                moved.append(block_id)
        for block_id in reversed(moved):
            self._cached.move_to_end(block_id, last=False)
        return len(moved)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless `tables` are exactly the references there are, and each block has one place."""
        expected: Counter[int] = Counter()
        for table in tables:
            _require(len(set(table)) == len(table), f"a table holds a block twice: {list(table)}")
            expected.update(table)
        places = Counter([*self._free, *self._cached, *self._quarantined])
        for block_id, num_references in enumerate(self._num_references):
            _require(
                num_references == expected[block_id],
                f"block {block_id} has {num_references} references, the tables {expected[block_id]}",
            )
            _require(places[block_id] == (num_references == 0), f"block {block_id} is in two places or in none")
            prefix_hash = self._hash_of[block_id]
            _require(
                prefix_hash is None or self._block_of.get(prefix_hash) == block_id,
                f"block {block_id} cannot be found by its hash",
            )
            _require(
                num_references > 0 or (prefix_hash is not None) == (block_id in self._cached),
                f"block {block_id} is unreferenced, and its hash does not fit its place",
            )
        num_next = Counter(self._previous_of.values())
        _require(self._num_next == num_next, "the blocks that come after others are counted wrong")
        num_hashed = self.num_blocks - self._hash_of.count(None)
        _require(num_hashed == len(self._block_of), f"{len(self._block_of)} hashes lead to {num_hashed} blocks")

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        self._drop_hash(block_id)
        self.num_evictions += 1
        return block_id

    def _drop_hash(self, block_id: int) -> None:
        prefix_hash = self._hash_of[block_id]
        if prefix_hash is not None:
            del self._block_of[prefix_hash]
            self._hash_of[block_id] = None
            previous_hash = self._previous_of.pop(prefix_hash, None)
            if previous_hash is not None:
                self._num_next[previous_hash] -= 1
                if not self._num_next[previous_hash]:
                    del self._num_next[previous_hash]


def _require(holds: bool, problem: str) -> None:
    # Not the assert statement: a double free under `python -O` would end as somebody else's tokens.
    if not holds:
        raise AssertionError(problem)
