"""How KV blocks move between two pools: publish, fetch, release.

    publisher                                    receiver
    publish(block_ids) -> KVTicket  ── call ──>  fetch(ticket, into_block_ids)      reads, then verifies
    on_release(block_ids)           <── call ──  release(ticket_id)                 the acknowledgement

A pool is one contiguous tensor [num_blocks, num_layers, block_size, width]; a block is pool[i].

Who owns what: published blocks belong to the transfer until `on_release` is called, which happens exactly once: at the
acknowledgement, when the lease ends, or at close. They must not be written to until then. Target blocks belong to the
caller of `fetch` all the time, and hold nothing usable until it returns.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

OnRelease = Callable[[tuple[int, ...]], None]


class Cause(enum.StrEnum):
    """Why a transfer failed: the `cause` of TransferFailed, and the label of the metric."""

    LAYOUT = "layout"  # the pools do not hold the same thing
    INCARNATION = "incarnation"  # the publisher is not, or is no longer, who it was taken for
    POSITION = "position"  # the ticket is for other tokens than were asked for
    TRUNCATED = "truncated"  # fewer or more blocks than the tokens need
    DIGEST = "digest"  # a block arrived with other bytes than were published
    EXPIRED = "expired"  # the lease on the published blocks has ended
    TIMEOUT = "timeout"
    SENDER_LOST = "sender_lost"  # the publisher died, or its transport did
    MISPLACED = "misplaced"  # the bytes landed elsewhere than in the target blocks
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who publishes. incarnation: new at each start, so that a restarted replica is not mistaken for its old self."""

    replica_id: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class KVTicket:
    """The right to fetch some published blocks, and what is needed to check what arrives.

    first_token, num_tokens: the position range that the blocks hold; the last block may be partly filled.
    run_lengths: blocks per descriptor; the receiver's target blocks of one run have to be consecutive too.
    digests: one of DIGEST_BYTES a block, in order. expires_at_s: Unix time after which no fetch may start.
    ref: what the transport needs to find the blocks. A ticket is fetched at most once a replica, whatever comes of it.
    """

    ticket_id: str
    publisher: Identity
    layout: str
    first_token: int
    num_tokens: int
    block_size: int
    run_lengths: tuple[int, ...]
    digests: bytes
    expires_at_s: float
    ref: object = field(default=None, repr=False, compare=False)

    @property
    def num_blocks(self) -> int:
        return sum(self.run_lengths)


@dataclass(frozen=True, slots=True)
class Expected:
    """What the receiver asked for, to be held against the ticket. incarnation None: any of the publisher's."""

    first_token: int
    num_tokens: int
    incarnation: str | None = None


@dataclass(frozen=True, slots=True)
class FetchReport:
    """What a fetch cost. wait_ms: until the transfer began; read_ms: moving the bytes; verify_ms: digests."""

    num_bytes: int
    num_descriptors: int
    wait_ms: float
    read_ms: float
    verify_ms: float

    @property
    def total_ms(self) -> float:
        return self.wait_ms + self.read_ms + self.verify_ms


class Transfer(Protocol):
    """Moves blocks out of and into one pool. All calls are made on one event loop; `on_release` is called on it."""

    async def publish(
        self,
        block_ids: Sequence[int],
        *,
        first_token: int,
        num_tokens: int,
        on_release: OnRelease,
        receiver_block_ids: Sequence[int] | None = None,
        ttl_s: float | None = None,
    ) -> KVTicket:
        """Offer blocks for reading and hold them until release, or until fetches begun within ttl_s have ended.

        receiver_block_ids: where they will be fetched to, if known: neighbours on both sides travel as one piece.
        If it raises (cancelled, TransferFailed), nothing is held and `on_release` is not called.
        """
        ...

    async def fetch(
        self, ticket: KVTicket, into_block_ids: Sequence[int], *, expected: Expected, timeout_s: float | None = None
    ) -> FetchReport:
        """Read the ticket's blocks into the given ones, in order, and verify them.

        Does not acknowledge. Raises TransferFailed; with `must_quarantine` the target blocks may still be written to.
        Cancellation is raised only once nothing is written any more (where that is not sure: TransferFailed instead).
        """
        ...

    async def release(self, ticket_id: str) -> bool:
        """End the lease of a ticket of this publisher. False if there is none (any more): never an error."""
        ...

    async def close(self) -> None:
        """Release everything and refuse further calls."""
        ...
