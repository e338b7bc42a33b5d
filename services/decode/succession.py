"""What becomes of the idle sessions of a decode replica that stops: another one takes their KV over.

The one that stops is no longer reached by others, so it is the one that acts: it asks the successor what that has
already, publishes the rest, and the successor fetches it. Before the first block moves the successor says in the
registry whose sessions it inherits, so routers send their next turns there. What does not get there in time is computed
again by the turn that wants it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.common.errors import OutOfBlocks, TransferFailed, Unavailable
from services.common.telemetry import Metrics
from services.decode.held_sessions import HeldSession, HeldSessions
from services.engine.engine import Engine
from services.engine.loop import EngineLoop
from services.replica.exchange import BlockExchange
from services.sessions.registry import ReplicaRecord
from services.transfer.base import Identity, KVTicket

log = logging.getLogger(__name__)

_NUM_AT_ONCE = 4
_MAX_INHERITED = 64


@dataclass(frozen=True, slots=True)
class Prefix:
    """Tokens whose KV may be held, from position 0 on."""

    token_ids: Sequence[int]
    salt: bytes


@dataclass(frozen=True, slots=True)
class Adoption:
    """Asks for the KV of a session to be fetched: ticket has that of prefix from its first token to the end.

    successor: the very process that is meant.
    """

    successor: Identity
    session_digest: str
    prefix: Prefix
    ticket: KVTicket


@dataclass(frozen=True, slots=True)
class HandedOver:
    """What a replica that stopped has got done. num_moved: sessions of num_sessions; num_tokens: of those moved."""

    successor: str = ""
    num_sessions: int = 0
    num_moved: int = 0
    num_tokens: int = 0


class SuccessorClient(Protocol):
    """Reaches another decode replica. All raise Unavailable."""

    async def inherit(self, successor: Identity, incarnations: tuple[str, ...]) -> bool:
        """Tells it whose sessions it gets. False if it is another process by now."""
        ...

    async def num_held(self, successor: Identity, prefix: Prefix) -> int:
        """Leading tokens that it holds already, in full blocks."""
        ...

    async def adopt(self, adoption: Adoption) -> bool:
        """Lets it fetch. False if it has no room, or if the transfer failed."""
        ...


class Heir:
    """Takes over sessions of others. inherits: incarnations of those who left them, the last ones."""

    def __init__(self, loop: EngineLoop, exchange: BlockExchange, held: HeldSessions, metrics: Metrics) -> None:
        self._loop = loop
        self._exchange = exchange
        self._held = held
        self._metrics = metrics
        self._one_at_a_time = asyncio.Lock()
        self.inherits: tuple[str, ...] = ()

    def inherit(self, successor: Identity, incarnations: tuple[str, ...]) -> bool:
        """See SuccessorClient."""
        if successor != self._exchange.identity:
            return False
        kept = [each for each in self.inherits if each not in incarnations]
        self.inherits = (*kept, *incarnations)[-_MAX_INHERITED:]
        return True

    async def num_held(self, prefix: Prefix) -> int:
        """See SuccessorClient."""
        return await self._loop.call(lambda engine: engine.match(prefix.token_ids, prefix.salt))

    async def adopt(self, adoption: Adoption) -> bool:
        """See SuccessorClient."""
        async with self._one_at_a_time:  # so that the room that was seen is still there
            has_moved = adoption.successor == self._exchange.identity and await self._fetch(adoption)
            if has_moved:
                self._held.ended(adoption.session_digest, adoption.prefix.token_ids, adoption.prefix.salt)
        self._metrics.increment("session_handovers", outcome="adopted" if has_moved else "refused")
        return has_moved

    async def _fetch(self, adoption: Adoption) -> bool:
        prefix, ticket = adoption.prefix, adoption.ticket
        num_free = (await self._loop.call(Engine.stats)).num_free_blocks
        # Not at the cost of sessions that are here already.
        if ticket.num_blocks > num_free - self._held.num_blocks(self._exchange.block_size):
            return False
        try:
            reservation = await self._exchange.reserve(prefix.token_ids, prefix.salt)
        except OutOfBlocks:
            return False
        try:
            if reservation.num_computed_tokens != ticket.first_token:
                return False  # a turn of the session has come meanwhile
            await self._exchange.fetch(reservation, ticket, ticket.first_token, ticket.num_tokens, ticket.publisher)
        except TransferFailed:
            return False
        else:
            return True
        finally:
            self._exchange.give_back(reservation)


def choose_successor(records: Sequence[ReplicaRecord], leaving: Identity, layout: str) -> ReplicaRecord | None:
    """The decode replica with most room for sessions of another; None if there is no other one."""
    able = [
        each
        for each in records
        if each.replica_id != leaving.replica_id and each.layout_fingerprint == layout and not each.is_draining
    ]
    return max(able, key=lambda each: each.num_free_blocks - each.num_session_blocks, default=None)


class Estate:
    """The sessions of a replica that stops: it takes no turns any more, and its engine still runs."""

    def __init__(self, exchange: BlockExchange, held: HeldSessions, client: SuccessorClient) -> None:
        self._exchange = exchange
        self._held = held
        self._client = client

    @property
    def num_sessions(self) -> int:
        return len(self._held)

    async def hand_over(self, successor: ReplicaRecord, inherited: tuple[str, ...], timeout_s: float) -> HandedOver:
        """Moves what it can within timeout_s, the sessions used last first. inherited: of others, by this replica."""
        heir = Identity(successor.replica_id, successor.incarnation)
        sessions = self._held.recent_first()
        if not sessions:
            return HandedOver()
        moved: list[HeldSession] = []
        try:
            async with asyncio.timeout(timeout_s):
                if await self._client.inherit(heir, (*inherited, self._exchange.identity.incarnation)):
                    await self._move_all(heir, sessions, moved)
        except (TimeoutError, Unavailable) as error:
            log.warning("not all sessions were handed over", extra={"reason": type(error).__name__})
        num_tokens = sum(len(each.token_ids) for each in moved)
        return HandedOver(successor.replica_id, len(sessions), len(moved), num_tokens)

    async def _move_all(self, heir: Identity, sessions: Sequence[HeldSession], moved: list[HeldSession]) -> None:
        waiting = iter(sessions)

        async def work() -> None:
            for session in waiting:
                if await self._move(heir, session):
                    moved.append(session)

        async with asyncio.TaskGroup() as group:
            for _ in range(_NUM_AT_ONCE):
                group.create_task(work())

    async def _move(self, heir: Identity, session: HeldSession) -> bool:
        try:
            num_there = await self._client.num_held(heir, Prefix(session.token_ids, session.salt))
            return num_there >= len(session.token_ids) or await self._send(heir, session, num_there)
        except (TransferFailed, Unavailable) as error:
            log.warning("a session was not handed over", extra={"session": session.digest, "reason": error.reason})
            return False

    async def _send(self, heir: Identity, session: HeldSession, num_there: int) -> bool:
        """Lends what is not there yet until the heir has fetched it."""
        size, exchange = self._exchange.block_size, self._exchange
        held, num_held = await exchange.take(
            lambda engine: engine.hold(session.token_ids, session.salt),
            lambda engine, taken: engine.release_blocks(taken[0]),
        )
        lent = held[num_there // size :]
        exchange.release_blocks(held[: len(held) - len(lent)])
        if not lent:
            return False
        ticket = await exchange.publish(lent, num_there, len(lent) * size, None)
        try:
            prefix = Prefix(session.token_ids[:num_held], session.salt)
            return await self._client.adopt(Adoption(heir, session.digest, prefix, ticket))
        finally:
            await exchange.release(ticket)
