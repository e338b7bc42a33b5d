"""The sequences of one engine, waiting and running, and who of them gets the blocks.

Both queues are in order of arrival. Blocks are taken from the latest, so the earliest always goes on: a running
sequence that has to yield goes back to the head of those that wait, with nothing computed.
"""

from __future__ import annotations

from collections import OrderedDict

from services.engine.block_pool import BlockPool
from services.engine.sequence import Sequence, SequenceStatus


class SequenceQueues:
    """Attributes: waiting and running (by seq_id, in order of arrival), num_preemptions.

    max_running: most sequences that run at the same time. Not thread-safe: the scheduler's thread calls it.
    """

    def __init__(self, pool: BlockPool, max_running: int) -> None:
        self.pool = pool
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        self.running: OrderedDict[str, Sequence] = OrderedDict()
        self.num_preemptions = 0
        self._max_running = max_running
        self._num_arrivals = 0

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def can_admit(self) -> bool:
        """Whether somebody waits and another one may run; whether there are blocks is not looked at."""
        return bool(self.waiting) and len(self.running) < self._max_running

    def find(self, seq_id: str) -> Sequence | None:
        """The sequence, waiting or running."""
        return self.running.get(seq_id) or self.waiting.get(seq_id)

    def append(self, seq: Sequence) -> None:
        """The latest arrival."""
        seq.arrival = self._num_arrivals
        self._num_arrivals += 1
        self.waiting[seq.seq_id] = seq

    def remove(self, seq: Sequence) -> None:
        """Takes a sequence out of its queue; its blocks stay its own."""
        queue = self.running if seq.status is SequenceStatus.RUNNING else self.waiting
        del queue[seq.seq_id]

    def num_blocks_of_first_waiting(self) -> int:
        """Blocks that the next one to be admitted lacks for the tokens it has; 0 if nobody waits."""
        return self.num_missing_blocks(next(iter(self.waiting.values()))) if self.waiting else 0

    # Blocks for running sequences.

    def running_with_room(self) -> list[Sequence]:
        """The running sequences, each with a slot for its next token; takes blocks from the latest where it must."""
        block_size = self.pool.block_size
        with_room = []
        for seq in list(self.running.values()):
            if seq.status is not SequenceStatus.RUNNING:
                continue  # an earlier one took its blocks
            if seq.num_computed_tokens < len(seq.block_table) * block_size or self._grow(seq):
                with_room.append(seq)
        return with_room

    def _grow(self, seq: Sequence) -> bool:
        """Gives a running sequence one more block. False: it had to yield, or all blocks are held outside."""
        while self.pool.num_free_blocks == 0:
            if self._take_back_from_waiting():
                continue
            latest = next(reversed(self.running.values()))
            if latest is seq and len(self.running) == 1:
                return False
            self._preempt(latest)
            if latest is seq:
                return False
        seq.block_table += self.pool.allocate(1)
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Puts the latest running sequence back to the head of the queue, with nothing computed."""
        del self.running[seq.seq_id]
        seq.status = SequenceStatus.WAITING
        self.waiting[seq.seq_id] = seq
        self.waiting.move_to_end(seq.seq_id, last=False)
        self._take_back(seq)

    def _take_back_from_waiting(self, spared: Sequence | None = None) -> bool:
        """Takes the blocks (of a reservation) from the latest waiting sequence that has some; False if none has."""
        for seq in reversed(self.waiting.values()):
            if seq.block_table and seq is not spared:
                self._take_back(seq)
                return True
        return False

    def _take_back(self, seq: Sequence) -> None:
        self.pool.release(seq.block_table)
        seq.block_table = []
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        self.num_preemptions += 1

    # Admission.

    def admit_waiting(self, num_tokens_left: int, guaranteed: int) -> list[Sequence]:
        """Lets waiting sequences run, in order, as far as tokens and blocks allow."""
        admitted: list[Sequence] = []
        num_promised = self.num_promised_blocks() if self.can_admit else 0
        while self.can_admit:
            seq = next(iter(self.waiting.values()))
            if not self._admit(seq, num_tokens_left, guaranteed, num_promised):
                break
            num_tokens_left -= min(seq.num_uncomputed_tokens, guaranteed)
            num_promised += self.num_missing_blocks(seq) + 1
            admitted.append(seq)
        return admitted

    def _admit(self, seq: Sequence, num_tokens_left: int, guaranteed: int, num_promised: int) -> bool:
        matched: list[int] = []
        if seq.reuses_prefix and not seq.block_table:
            # The last token is always computed: its logits are what the prompt is for.
            matched = self.pool.match(seq.block_hashes[: (seq.num_tokens - 1) // self.pool.block_size])
        num_computed = seq.num_computed_tokens or len(matched) * self.pool.block_size
        if min(seq.num_tokens - num_computed, guaranteed) > num_tokens_left:
            return False
        num_new = self.num_missing_blocks(seq) - len(matched)
        while not self.pool.can_take(matched, num_new + num_promised):
            # With nobody running nothing will be freed, unless those behind it give up what they brought along.
            if self.running or not self._take_back_from_waiting(spared=seq):
                return False
        if not seq.block_table:
            self.pool.acquire(matched)
            seq.block_table = matched
            seq.num_computed_tokens = num_computed
            if seq.num_preemptions == 0:
                seq.num_cached_tokens = num_computed
        del self.waiting[seq.seq_id]
        seq.status = SequenceStatus.RUNNING
        self.running[seq.seq_id] = seq
        return True

    def num_missing_blocks(self, seq: Sequence) -> int:
        """Blocks that a sequence lacks for the tokens it has."""
        return max(0, self.pool.num_blocks_for(seq.num_tokens) - len(seq.block_table))

    def num_promised_blocks(self) -> int:
        """Blocks that the running sequences will take for the tokens they have, and one each to grow into.

        Without the promise a newcomer's blocks would be taken back a step later.
        """
        return sum(self.num_missing_blocks(seq) + 1 for seq in self.running.values())
