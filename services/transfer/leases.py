"""Leases on published blocks: every block comes back, acknowledged or not."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from services.transfer.base import OnRelease


@dataclass(slots=True)
class Lease:
    """Blocks held for readers. ref: what keeps them readable, dropped with the lease."""

    block_ids: tuple[int, ...]
    on_release: OnRelease
    ref: object
    timer: asyncio.TimerHandle


class Leases:
    """All leases of one publisher. Each has its own timer, so that none depends on a reader or on a sweep."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}

    def hold(
        self, ticket_id: str, block_ids: tuple[int, ...], on_release: OnRelease, *, ttl_s: float, ref: object = None
    ) -> None:
        """Hold blocks until `end`, or for ttl_s seconds of the running event loop's clock."""
        timer = asyncio.get_running_loop().call_later(ttl_s, self.end, ticket_id)
        self._leases[ticket_id] = Lease(block_ids, on_release, ref, timer)

    def end(self, ticket_id: str) -> bool:
        """Give the blocks back; False if the lease had ended before."""
        lease = self._leases.pop(ticket_id, None)
        if lease is None:
            return False
        lease.timer.cancel()
        lease.on_release(lease.block_ids)
        return True

    def get(self, ticket_id: str) -> Lease | None:
        """The lease, if it has not ended."""
        return self._leases.get(ticket_id)

    def end_all(self) -> None:
        """Give all blocks back."""
        for ticket_id in list(self._leases):
            self.end(ticket_id)

    def __len__(self) -> int:
        return len(self._leases)
