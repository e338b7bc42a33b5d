"""Transfer between pools of one process: a copy, with the same tickets, leases and checks as between machines."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

import torch

from services.common.errors import TransferFailed
from services.transfer.base import Cause, Expected, FetchReport, Identity, KVTicket, OnRelease
from services.transfer.digest import BlockDigest
from services.transfer.leases import Leases
from services.transfer.runs import run_lengths
from services.transfer.verify import (
    check_blocks,
    check_digests,
    check_pool,
    check_ticket,
    check_tokens,
    layout_fingerprint,
)

DEFAULT_TTL_S = 30.0


class LocalHub:
    """The replicas of one process that can reach each other."""

    def __init__(self) -> None:
        self._transfers: dict[Identity, LocalTransfer] = {}

    def add(self, transfer: LocalTransfer) -> None:
        """Make a replica reachable."""
        self._transfers[transfer.identity] = transfer

    def remove(self, transfer: LocalTransfer) -> None:
        """Make a replica unreachable."""
        self._transfers.pop(transfer.identity, None)

    def find(self, identity: Identity) -> LocalTransfer | None:
        """The replica, if it is reachable."""
        return self._transfers.get(identity)


class LocalTransfer:
    """See base.Transfer. The copy is made on the event loop: in one process there is nobody to wait for."""

    def __init__(
        self, hub: LocalHub, pool: torch.Tensor, *, model: str, identity: Identity, ttl_s: float = DEFAULT_TTL_S
    ) -> None:
        check_pool(pool)
        self.identity = identity
        self.pool = pool
        self.leases = Leases()
        self._hub = hub
        self._ttl_s = ttl_s
        self._layout = layout_fingerprint(pool, model)
        self._digest = BlockDigest(pool)
        hub.add(self)

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
        """See base.Transfer."""
        self._require_open()
        check_blocks(block_ids, self.pool)
        block_size = self.pool.shape[2]
        check_tokens(num_tokens, len(block_ids), block_size)
        ttl_s = self._ttl_s if ttl_s is None else ttl_s
        ticket = KVTicket(
            ticket_id=uuid.uuid4().hex,
            publisher=self.identity,
            layout=self._layout,
            first_token=first_token,
            num_tokens=num_tokens,
            block_size=block_size,
            run_lengths=run_lengths(block_ids, receiver_block_ids),
            digests=self._digest.of(block_ids),
            expires_at_s=time.time() + ttl_s,
        )
        self.leases.hold(ticket.ticket_id, tuple(block_ids), on_release, ttl_s=ttl_s)
        return ticket

    async def fetch(
        self, ticket: KVTicket, into_block_ids: Sequence[int], *, expected: Expected, timeout_s: float | None = None
    ) -> FetchReport:
        """See base.Transfer. timeout_s is not used: a copy ends."""
        self._require_open()
        check_blocks(into_block_ids, self.pool)
        check_ticket(ticket, into_block_ids, expected, layout=self._layout, block_size=self.pool.shape[2])
        publisher = self._hub.find(ticket.publisher)
        if publisher is None:
            raise TransferFailed(Cause.SENDER_LOST, f"replica {ticket.publisher.replica_id} is gone")
        lease = publisher.leases.get(ticket.ticket_id)
        if lease is None:
            raise TransferFailed(Cause.EXPIRED, "the published blocks are no longer held")
        started = time.perf_counter()
        source = torch.tensor(lease.block_ids, device=publisher.pool.device)
        target = torch.tensor(into_block_ids, device=self.pool.device)
        self.pool.index_copy_(0, target, publisher.pool.index_select(0, source).to(self.pool.device))
        landed = time.perf_counter()
        check_digests(ticket, self._digest.of(into_block_ids))
        return FetchReport(
            num_bytes=len(into_block_ids) * self.pool[0].nbytes,
            num_descriptors=len(ticket.run_lengths),
            wait_ms=0.0,
            read_ms=(landed - started) * 1e3,
            verify_ms=(time.perf_counter() - landed) * 1e3,
        )

    async def release(self, ticket_id: str) -> bool:
        """See base.Transfer."""
        return self.leases.end(ticket_id)

    async def close(self) -> None:
        """See base.Transfer."""
        self._hub.remove(self)
        self.leases.end_all()

    def _require_open(self) -> None:
        if self._hub.find(self.identity) is not self:
            raise TransferFailed(Cause.CLOSED, "this replica's transfer has been closed")
