"""Decides what each step computes: continuous batching with chunked prefill under a token budget.

    schedule  ->  (the runner computes the chunks)  ->  commit

There is no prefill mode and no decode mode: a step is a list of chunks, and a chunk is some tokens of one sequence.
Sequences run in order of arrival. When blocks run out the latest arrival gives its blocks back and is computed again
later (its blocks usually stay cached until then), so the earliest one always goes on, and so everyone's turn comes:
`queues` does that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field

from services.common.errors import InvalidRequest, PromptTooLong, QueueFull
from services.common.prefix_hash import PrefixHasher
from services.common.sampling import FinishReason
from services.engine.block_pool import BlockPool
from services.engine.queues import SequenceQueues
from services.engine.reservation import Reservation, ReservationBook
from services.engine.sequence import Sequence, SequenceStatus

__all__ = ["Chunk", "Reservation", "Scheduler", "SchedulerConfig"]

# A prompt's guaranteed part of a step. Much smaller chunks make attention read a long history for a few queries.
_MAX_GUARANTEED_TOKENS = 64


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a step and of the queue.

    max_num_batched_tokens: most tokens a step computes; at least max_num_sequences, so that everyone gets one.
    max_num_sequences: most sequences that run at the same time. max_seq_len: most tokens of a sequence, reply included.
    max_num_waiting: most sequences that wait; one more is refused.
    """

    max_num_batched_tokens: int
    max_num_sequences: int
    max_seq_len: int
    max_num_waiting: int

    def __post_init__(self) -> None:
        for name in ("max_num_sequences", "max_num_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_seq_len < 2:
            raise ValueError(f"max_seq_len must leave room for a prompt and a reply, got {self.max_seq_len}")
        if self.max_num_batched_tokens < self.max_num_sequences:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_sequences"
                f" ({self.max_num_sequences}): every running sequence gets a token in every step"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Tokens start..start+num_tokens-1 of `seq`, to be computed in this step; their slots are in its block table.

    samples: the chunk reaches the sequence's last token, so the logits of its last row give the next one.
    is_ahead: its one token is what an open step will sample; the sequence does not have it yet.
    """

    seq: Sequence
    start: int
    num_tokens: int
    is_ahead: bool = False
    samples: bool = field(init=False)

    def __post_init__(self) -> None:
        # Fixed now: once the sampled token is appended, the chunk no longer reaches the end.
        reaches_end = self.is_ahead or self.start + self.num_tokens == len(self.seq.token_ids)
        object.__setattr__(self, "samples", reaches_end)


class Scheduler:
    """Owns the sequences of one engine and their references to `pool`. Not thread-safe: one thread calls it.

    Between `schedule` and `commit` a step is open: the runner may be writing to the blocks of its chunks. A sequence
    that ends meanwhile leaves at once, but its blocks are only given back when the step is committed. One more step can
    be opened by `schedule_ahead`; steps are committed in the order in which they were opened.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        # The last token of a sequence is sampled but never computed, hence the one more than there are slots.
        self.max_seq_len = min(config.max_seq_len, pool.num_blocks * pool.block_size + 1)
        self._queues = SequenceQueues(pool, config.max_num_sequences)
        self._reservations = ReservationBook(pool)
        self._open_steps: deque[list[list[int]]] = deque()  # block tables of sequences that ended while it was the last

    @property
    def num_running(self) -> int:
        return len(self._queues.running)

    @property
    def num_waiting(self) -> int:
        return len(self._queues.waiting)

    @property
    def num_preemptions(self) -> int:
        """How often a sequence had to give its blocks back."""
        return self._queues.num_preemptions

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens still to be computed, of waiting and running sequences."""
        queues = (self._queues.waiting, self._queues.running)
        return sum(seq.num_uncomputed_tokens for queue in queues for seq in queue.values())

    @property
    def num_running_tokens(self) -> int:
        """Tokens of the running sequences: what each step has to read."""
        return sum(seq.num_tokens for seq in self._queues.running.values())

    @property
    def num_reservations(self) -> int:
        """Reservations that are open."""
        return len(self._reservations)

    @property
    def has_open_step(self) -> bool:
        """Whether a step is scheduled and not committed."""
        return bool(self._open_steps)

    @property
    def has_work(self) -> bool:
        """Whether a sequence is waiting or running."""
        return len(self._queues) > 0

    # Sequences come and go.

    def add(self, seq: Sequence, reservation: Reservation | None = None) -> None:
        """Queues a sequence; the blocks of `reservation`, if given, become its own and count as computed so far.

        Raises PromptTooLong, InvalidRequest (it could not be served even alone) or QueueFull, with nothing changed:
        the reservation is then still the caller's.
        """
        if not seq.token_ids:
            raise InvalidRequest("prompt", "at least one token is needed")
        if seq.num_tokens >= self.config.max_seq_len:
            raise PromptTooLong(
                "prompt", f"{seq.num_tokens} tokens; fewer than {self.config.max_seq_len} can be served"
            )
        if seq.num_tokens >= self.max_seq_len:
            raise InvalidRequest("prompt", f"{seq.num_tokens} tokens; the KV cache holds {self.max_seq_len - 1}")
        if self.num_waiting >= self.config.max_num_waiting:
            raise QueueFull(f"{self.num_waiting} sequences are waiting already")
        if self._queues.find(seq.seq_id) is not None:
            raise ValueError(f"sequence {seq.seq_id!r} is scheduled already")
        if seq.hasher.block_size != self.pool.block_size:
            raise ValueError(f"prefix hashes of {seq.hasher.block_size} tokens, blocks of {self.pool.block_size}")
        if reservation is not None:
            self._reservations.move_into(reservation, seq)
        seq.max_seq_len = min(seq.max_seq_len, self.max_seq_len)
        self._queues.append(seq)

    def abort(self, seq_id: str) -> bool:
        """Ends a sequence and frees everything it holds; False if it is not (or no longer) here."""
        return self.finish(seq_id, FinishReason.ABORTED)

    def finish(self, seq_id: str, reason: FinishReason) -> bool:
        """Ends a sequence for a reason found outside, such as a stop string; False if it is not (or no longer) here.

        A sequence that keeps its blocks keeps them for STOP and LENGTH only; while a step is open the runner may still
        be writing to them.
        """
        seq = self._queues.find(seq_id)
        if seq is None:
            return False
        self._end(seq, reason)
        return True

    # A step.

    def schedule(self) -> list[Chunk]:
        """Opens a step: its chunks, in order of arrival, with blocks allocated.

        Every running sequence gets a token, every prompt a guaranteed number of them; half of what is left goes to the
        first prompt, half of the rest to the next, and so on: the first is done soon, and nobody waits for it to be.
        Empty when there is nothing to do, or when all blocks are held outside (reservations, kept, quarantined).
        """
        if self._open_steps:
            raise AssertionError("the previous step is still open: commit it")
        sequences = self._queues.running_with_room()
        num_left = self.config.max_num_batched_tokens - len(sequences)
        guaranteed = max(1, min(_MAX_GUARANTEED_TOKENS, num_left // 8))
        sizes = []
        for seq in sequences:
            size = min(seq.num_uncomputed_tokens, guaranteed, 1 + num_left)
            num_left -= size - 1
            sizes.append(size)
        for seq in self._queues.admit_waiting(num_left, guaranteed):
            size = min(seq.num_uncomputed_tokens, guaranteed)
            num_left -= size
            sequences.append(seq)
            sizes.append(size)
        _share_out(num_left, sequences, sizes)
        chunks = [self._chunk(seq, size) for seq, size in zip(sequences, sizes, strict=True)]
        if chunks:
            self._open_steps.append([])
        return chunks

    def schedule_ahead(self, chunks: Iterable[Chunk]) -> list[Chunk]:
        """Opens the step after that of `chunks`, which is open: the next token of every sequence that goes on.

        Whether one ends by its last token is not known yet; then its chunk was for nothing. Empty, with nothing opened,
        where somebody else could run, blocks would have to be taken from others, or what a sequence leaves behind
        must not change any more.
        """
        alive = [chunk for chunk in chunks if chunk.seq.status is SequenceStatus.RUNNING]
        if self._queues.can_admit or len(alive) < self.num_running or len(self._open_steps) != 1:
            return []
        going_on = [chunk for chunk in alive if not chunk.samples or chunk.seq.goes_on_whatever_is_sampled()]
        if any(not chunk.samples or chunk.seq.keeps_blocks for chunk in going_on):
            return []
        ahead = []
        for chunk in going_on:
            seq, position = chunk.seq, chunk.start + chunk.num_tokens
            if position >= len(seq.block_table) * self.pool.block_size:
                if self.pool.num_free_blocks == 0:
                    return []
                seq.block_table += self.pool.allocate(1)
            ahead.append(Chunk(seq, position, 1, is_ahead=True))
        if ahead:
            self._open_steps.append([])
        return ahead

    def commit(self, chunks: Iterable[Chunk], sampled: Mapping[str, int]) -> list[Sequence]:
        """Closes the oldest open step. chunks: computed; sampled: the next token of each that samples, by seq_id.

        Returns the sequences that finished. Sequences that ended while the step was open are passed over. After a step
        that failed, `commit((), {})` closes it as if it had not been.
        """
        alive = [chunk for chunk in chunks if chunk.seq.status is SequenceStatus.RUNNING]
        missing = [chunk.seq.seq_id for chunk in alive if chunk.samples and chunk.seq.seq_id not in sampled]
        if missing:
            raise AssertionError(f"no token was sampled for {missing}")
        for table in self._open_steps.popleft() if self._open_steps else ():
            self.pool.release(table)
        finished = []
        for chunk in alive:
            seq = chunk.seq
            self._advance(seq, chunk.start + chunk.num_tokens)
            if chunk.samples:
                token_id = sampled[seq.seq_id]
                reason = seq.finish_reason_after(token_id)
                seq.append(token_id)
                if reason is not None:
                    self._end(seq, reason)
                    finished.append(seq)
        return finished

    # KV that comes from another replica.

    def reserve(self, token_ids: Iterable[int], hasher: PrefixHasher) -> Reservation:
        """Sets blocks aside for the KV of all `token_ids`, sharing those that are held here already.

        Never takes what running sequences or the first waiting one will need. Raises OutOfBlocks, nothing changed.
        """
        num_promised = self._queues.num_promised_blocks() + self._queues.num_blocks_of_first_waiting()
        return self._reservations.open(token_ids, hasher, num_promised)

    def arrived(self, reservation: Reservation, num_tokens: int) -> None:
        """The KV of the first `num_tokens` tokens is in place and verified; from now on others may find it."""
        self._reservations.arrived(reservation, num_tokens)

    def cancel(self, reservation: Reservation) -> None:
        """Gives the blocks back (nothing writes to them any more); does nothing to one that is no longer open."""
        self._reservations.cancel(reservation)

    def quarantine(self, reservation: Reservation, from_token: int) -> list[int]:
        """Ends a reservation whose transfer was given up: tokens from `from_token` on may still be written.

        Their blocks go into quarantine and are returned, for `pool.readmit` later; the others are given back.
        """
        return self._reservations.quarantine(reservation, from_token)

    def check_integrity(self, tables_held_outside: Iterable[ListLike[int]] = ()) -> None:
        """Raises AssertionError unless the pool's references are those of the sequences and reservations here.

        tables_held_outside: whatever else references blocks: tables kept at a finish, blocks being published.
        """
        sequences = [*self._queues.running.values(), *self._queues.waiting.values()]
        tables = [seq.block_table for seq in sequences]
        tables += self._reservations.tables()
        ended = [table for step in self._open_steps for table in step]
        self.pool.check_integrity([*tables, *ended, *tables_held_outside])
        arrivals = [seq.arrival for seq in sequences]
        if arrivals != sorted(arrivals):
            raise AssertionError(f"the queues are not in order of arrival: {sequences}")
        for seq in sequences:
            num_slots = len(seq.block_table) * self.pool.block_size
            if not (seq.num_computed_tokens <= num_slots and seq.num_computed_tokens < seq.num_tokens):
                raise AssertionError(f"tokens and blocks do not fit: {seq}")

    # Parts of a step.

    def _chunk(self, seq: Sequence, size: int) -> Chunk:
        """A chunk of `size` tokens, or of as many as there are blocks for (there is room for one at least)."""
        start = seq.num_computed_tokens
        num_missing = self.pool.num_blocks_for(start + size) - len(seq.block_table)
        if num_missing > 0:
            seq.block_table += self.pool.allocate(min(num_missing, self.pool.num_free_blocks))
            size = min(size, len(seq.block_table) * self.pool.block_size - start)
        return Chunk(seq, start, size)

    # Progress and end of a sequence.

    def _advance(self, seq: Sequence, num_computed: int) -> None:
        block_size = self.pool.block_size
        for index in range(seq.num_computed_tokens // block_size, num_computed // block_size):
            hashes = seq.block_hashes
            self.pool.commit(seq.block_table[index], hashes[index], hashes[index - 1] if index else None)
        seq.num_computed_tokens = num_computed

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        self._queues.remove(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason
        if seq.keeps_blocks and reason in (FinishReason.STOP, FinishReason.LENGTH):
            return
        if self._open_steps:
            self._open_steps[-1].append(seq.block_table)
        else:
            self.pool.release(seq.block_table)
        seq.block_table = []


def _share_out(num_left: int, sequences: list[Sequence], sizes: list[int]) -> None:
    """Adds the rest of the budget to `sizes`: first by halves, as `schedule` says, then what remains in order."""
    hungry = [index for index, seq in enumerate(sequences) if seq.num_uncomputed_tokens > sizes[index]]
    for part in (2, 1):
        for index in hungry:
            extra = min(sequences[index].num_uncomputed_tokens - sizes[index], -(-num_left // part))
            sizes[index] += extra
            num_left -= extra
