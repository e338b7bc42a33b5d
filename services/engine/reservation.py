"""Blocks set aside for KV that another replica computes: reserved, filled by a transfer, then part of a sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.common.errors import OutOfBlocks
from services.common.prefix_hash import PrefixHasher
from services.engine.block_pool import BlockPool
from services.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class Reservation:
    """All of `token_ids` fit into `block_table`; only the scheduler changes it.

    The first `num_computed_tokens` are in place: at first the `num_cached_tokens` that this replica held already
    (shared blocks, never to be written), later what has arrived. The rest of the table may be written by a transfer.
    is_open turns False when the blocks are given back or move into a sequence.
    """

    token_ids: list[int]
    block_table: list[int]
    block_hashes: list[bytes]
    num_cached_tokens: int
    num_computed_tokens: int
    is_open: bool = True


class ReservationBook:
    """The open reservations of one scheduler; each references the blocks of its table."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._open: set[Reservation] = set()

    def __len__(self) -> int:
        return len(self._open)

    def tables(self) -> list[list[int]]:
        """The block tables of all open reservations."""
        return [reservation.block_table for reservation in self._open]

    def open(self, token_ids: Iterable[int], hasher: PrefixHasher, num_promised: int) -> Reservation:
        """Acquires the held prefix and allocates the rest, leaving `num_promised` blocks free.

        Raises OutOfBlocks, with nothing changed.
        """
        if hasher.block_size != self._pool.block_size:
            raise ValueError(f"prefix hashes of {hasher.block_size} tokens, blocks of {self._pool.block_size}")
        tokens = list(token_ids)
        hashes = hasher.hashes(tokens)
        matched = self._pool.match(hashes)
        num_new = self._pool.num_blocks_for(len(tokens)) - len(matched)
        if not self._pool.can_take(matched, num_new + num_promised):
            num_free = self._pool.num_free_blocks
            raise OutOfBlocks(f"{num_new} new KV blocks needed; {num_free} free, {num_promised} of them promised")
        self._pool.acquire(matched)
        table = matched + self._pool.allocate(num_new)
        num_held = len(matched) * self._pool.block_size
        reservation = Reservation(tokens, table, hashes, num_cached_tokens=num_held, num_computed_tokens=num_held)
        self._open.add(reservation)
        return reservation

    def arrived(self, reservation: Reservation, num_tokens: int) -> None:
        """Makes the full blocks of the first `num_tokens` tokens findable: they are in place and verified."""
        self._require_open(reservation)
        num_before = reservation.num_computed_tokens
        if not num_before <= num_tokens <= len(reservation.token_ids):
            raise ValueError(f"{num_tokens} tokens arrived of {len(reservation.token_ids)}; {num_before} were in place")
        for index in range(num_before // self._pool.block_size, num_tokens // self._pool.block_size):
            hashes = reservation.block_hashes
            self._pool.commit(reservation.block_table[index], hashes[index], hashes[index - 1] if index else None)
        reservation.num_computed_tokens = num_tokens

    def cancel(self, reservation: Reservation) -> None:
        """Gives the blocks back; does nothing to a reservation that is no longer open."""
        if reservation.is_open:
            self._close(reservation)
            self._pool.release(reservation.block_table)

    def quarantine(self, reservation: Reservation, from_token: int) -> list[int]:
        """Puts the blocks from `from_token` on into quarantine and returns them; the others are given back."""
        self._require_open(reservation)
        if from_token < reservation.num_computed_tokens:
            raise ValueError(f"token {from_token} is in place and verified: it cannot be written any more")
        self._close(reservation)
        first = from_token // self._pool.block_size
        doubtful = reservation.block_table[first:]
        self._pool.quarantine(doubtful)
        self._pool.release(reservation.block_table[:first])
        return doubtful

    def move_into(self, reservation: Reservation, seq: Sequence) -> None:
        """Makes the blocks those of `seq`, which must begin with the reservation's tokens."""
        self._require_open(reservation)
        if not seq.reuses_prefix:
            raise ValueError(f"sequence {seq.seq_id!r} computes every token itself: a reservation is of no use to it")
        num_tokens, num_hashes = len(reservation.token_ids), len(reservation.block_hashes)
        if (
            seq.token_ids[:num_tokens] != reservation.token_ids
            or seq.block_hashes[:num_hashes] != reservation.block_hashes
        ):
            raise ValueError(f"sequence {seq.seq_id!r} does not begin with the tokens of the reservation")
        self._close(reservation)
        seq.block_table = reservation.block_table
        seq.num_computed_tokens = reservation.num_computed_tokens
        if seq.num_computed_tokens == seq.num_tokens:
            # The last token is computed again for its logits; a full block may be shared, so that one as a whole.
            seq.num_computed_tokens -= 1
            if seq.num_tokens % self._pool.block_size == 0:
                self._pool.release([seq.block_table.pop()])
                seq.num_computed_tokens = len(seq.block_table) * self._pool.block_size
        seq.num_cached_tokens = min(reservation.num_cached_tokens, seq.num_computed_tokens)

    def _close(self, reservation: Reservation) -> None:
        reservation.is_open = False
        self._open.remove(reservation)

    def _require_open(self, reservation: Reservation) -> None:
        if reservation not in self._open:
            raise AssertionError("the reservation has been cancelled, quarantined or used")
