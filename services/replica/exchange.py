"""The blocks of one engine as others see them: lent to readers, filled by transfers, and never lost on the way.

Whoever takes blocks may be cancelled at any await; so what the engine has handed out is always either the caller's or
given back here, in the background, between two steps.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from services.common.errors import TransferFailed, Unavailable
from services.common.telemetry import Metrics
from services.engine.engine import Engine
from services.engine.loop import EngineLoop
from services.engine.scheduler import Reservation
from services.replica.handover import HistoryClient, HistoryOffer, HistoryRequest, blocks_between
from services.replica.measured import Measured
from services.transfer.base import Expected, FetchReport, Identity, KVTicket, Transfer

T = TypeVar("T")

log = logging.getLogger(__name__)

# A transfer of less says more about its overhead than about the link.
_MIN_MEASURED_BYTES = 1 << 16


class BlockExchange:
    """Publishes blocks of an engine's pool and fetches into them. Used on one event loop.

    identity: as others know this process. quarantine_s: how long blocks of a doubtful transfer stay unused.
    transfer_bytes_per_s: median of the last ones, None until measured.
    """

    def __init__(
        self, loop: EngineLoop, transfer: Transfer, *, identity: Identity, block_size: int, quarantine_s: float,
        metrics: Metrics,
    ) -> None:  # fmt: skip
        self.identity = identity
        self.block_size = block_size
        self._loop = loop
        self._transfer = transfer
        self._quarantine_s = quarantine_s
        self._metrics = metrics
        self._rate = Measured()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timers: set[asyncio.TimerHandle] = set()

    @property
    def transfer_bytes_per_s(self) -> float | None:
        return self._rate.value

    # Taking and giving back.

    async def take(self, take: Callable[[Engine], T], undo: Callable[[Engine, T], object]) -> T:
        """take(engine) between two steps; undone if the caller is cancelled meanwhile. Raises what it raises."""
        task = self._spawn(self._loop.call(take))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(lambda done: self._undo(done, undo))
            raise

    async def reserve(self, token_ids: Sequence[int], salt: bytes) -> Reservation:
        """Blocks for the KV of token_ids. Raises OutOfBlocks."""
        return await self.take(lambda engine: engine.reserve(token_ids, salt), _cancel)

    def give_back(self, reservation: Reservation) -> None:
        """Ends a reservation soon; nothing happens to one that has become a sequence's."""
        self.soon(lambda engine: engine.cancel(reservation))

    def release_blocks(self, block_ids: Sequence[int]) -> None:
        """Drops references that hold or keeps_blocks gave, soon."""
        if block_ids:
            self.soon(lambda engine: engine.release_blocks(block_ids))

    def soon(self, fn: Callable[[Engine], object]) -> None:
        """fn(engine) between two steps, whatever becomes of the caller; nothing once the engine has stopped."""
        self._spawn(self._loop.call(fn)).add_done_callback(_log_failure)

    # Lending.

    async def publish(
        self, block_ids: Sequence[int], first_token: int, num_tokens: int, receiver_block_ids: Sequence[int] | None
    ) -> KVTicket:
        """Lends blocks that the caller has referenced; the references are given back when the lease ends.

        Raises TransferFailed; the references are then given back too.
        """
        try:
            return await self._transfer.publish(
                block_ids,
                first_token=first_token,
                num_tokens=num_tokens,
                on_release=self.release_blocks,
                receiver_block_ids=receiver_block_ids,
            )
        except BaseException:
            self.release_blocks(block_ids)
            raise

    async def release(self, ticket: KVTicket) -> None:
        """Ends a lease of this replica: its reader has what it wanted, or does not want it any more."""
        await self._transfer.release(ticket.ticket_id)

    @asynccontextmanager
    async def offering(self, request: HistoryRequest) -> AsyncIterator[HistoryOffer]:
        """Lends what is wanted, as far as it is held, until the context ends. Raises TransferFailed."""
        if request.holder != self.identity:
            yield HistoryOffer(None)
            return
        held, _ = await self.take(
            lambda engine: engine.hold(request.token_ids, request.salt),
            lambda engine, taken: engine.release_blocks(taken[0]),
        )
        first = request.first_token // self.block_size
        lent = held[first : first + len(request.into_block_ids)]
        self.release_blocks(held[:first] + held[first + len(lent) :])
        if not lent:
            yield HistoryOffer(None)
            return
        num_tokens = len(lent) * self.block_size
        ticket = await self.publish(lent, request.first_token, num_tokens, request.into_block_ids[: len(lent)])
        try:
            yield HistoryOffer(ticket)
        finally:
            await self.release(ticket)

    # Fetching.

    async def fetch(
        self, reservation: Reservation, ticket: KVTicket, first_token: int, num_tokens: int, holder: Identity
    ) -> FetchReport:
        """Fetches KV of num_tokens tokens from first_token (where the reservation's computed tokens end) into it.

        Raises TransferFailed, which has been counted; where the blocks may still be written to, the reservation has
        been ended (is_open is False) and they are in quarantine.
        """
        table = blocks_between(reservation.block_table, first_token, first_token + num_tokens, self.block_size)
        expected = Expected(first_token, num_tokens, holder.incarnation)
        try:
            report = await self._transfer.fetch(ticket, table, expected=expected)
        except TransferFailed as error:
            self._metrics.increment("kv_transfer_failures", reason=str(error.cause))
            log.warning("KV blocks did not arrive", extra={"reason": str(error.cause)})
            if error.must_quarantine:
                await self._quarantine(reservation, first_token)
            raise
        self._metrics.observe("kv_transfer_seconds", report.total_ms / 1e3)
        self._metrics.increment("kv_transfer_bytes", report.num_bytes)
        if report.num_bytes >= _MIN_MEASURED_BYTES:
            self._rate.record(report.num_bytes / max(report.read_ms + report.verify_ms, 1e-3) * 1e3)
        end = first_token + num_tokens
        await self._loop.call(lambda engine: engine.arrived(reservation, end))
        return report

    async def fetch_history(
        self, peers: HistoryClient, reservation: Reservation, holder: Identity, num_tokens: int, salt: bytes,
        *, moved_session: str = "",
    ) -> FetchReport | None:  # fmt: skip
        """Fetches what the reservation lacks of its first num_tokens tokens (full blocks) from a holder.

        moved_session: as in HistoryRequest. None if the holder has nothing of it. Raises Unavailable, or as `fetch`.
        """
        first = reservation.num_computed_tokens
        request = HistoryRequest(
            holder=holder,
            token_ids=tuple(reservation.token_ids[:num_tokens]),
            salt=salt,
            first_token=first,
            into_block_ids=blocks_between(reservation.block_table, first, num_tokens, self.block_size),
            moved_session=moved_session,
        )
        async with peers.history(request) as offer:
            if offer.ticket is None:
                return None
            num_offered = min(offer.ticket.num_tokens, num_tokens - first)
            return await self.fetch(reservation, offer.ticket, first, num_offered, holder)

    async def close(self) -> None:
        """Ends all leases and waits for what is still to be given back; the engine still runs."""
        await self._transfer.close()
        for timer in self._timers:
            timer.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    # How it is done.

    async def _quarantine(self, reservation: Reservation, from_token: int) -> None:
        task = self._spawn(self._loop.call(lambda engine: engine.quarantine(reservation, from_token)))
        task.add_done_callback(self._readmit_later)
        await asyncio.shield(task)
        current = asyncio.current_task()
        if current is not None and current.cancelling():
            raise asyncio.CancelledError  # the transfer has answered a cancellation with its failure

    def _readmit_later(self, done: asyncio.Task[list[int]]) -> None:
        if done.cancelled() or done.exception() is not None:
            return
        block_ids = done.result()

        def readmit() -> None:
            self._timers.discard(timer)
            self.soon(lambda engine: engine.readmit(block_ids))

        timer = asyncio.get_running_loop().call_later(self._quarantine_s, readmit)
        self._timers.add(timer)

    def _undo(self, done: asyncio.Task[T], undo: Callable[[Engine, T], object]) -> None:
        if not done.cancelled() and done.exception() is None:
            taken = done.result()
            self.soon(lambda engine: undo(engine, taken))

    def _spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _cancel(engine: Engine, reservation: Reservation) -> None:
    engine.cancel(reservation)


def _log_failure(done: asyncio.Task[Any]) -> None:
    error = None if done.cancelled() else done.exception()
    if error is not None and not isinstance(error, Unavailable):
        log.error("blocks were not given back", exc_info=error)
