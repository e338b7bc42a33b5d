"""The session store of a single process: the same contract, nothing outlives the process, nothing is shared."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from services.common.errors import AlreadyExists, QuotaExceeded, SessionBusy, StaleLease
from services.sessions.base import (
    NUM_REPLAYABLE_TURNS,
    SESSION_OVERHEAD_BYTES,
    Acquired,
    AlreadyCommitted,
    Holder,
    JournalPosition,
    Lease,
    RecordPage,
    SessionRecord,
    TurnRecord,
    TurnStart,
    check_new_session,
    check_page,
    new_owner,
    new_session_id,
    not_found,
)
from services.sessions.journal import pack_turn

T = TypeVar("T")


@dataclass(slots=True)
class _Committed:
    """A turn of the journal and what tells it from others."""

    turn: TurnRecord
    mark: bytes
    idempotency_key: str | None
    num_bytes: int


@dataclass(slots=True)
class _Session:
    session_id: str
    model: str
    template_digest: str
    created_us: int
    updated_s: float
    expires_s: float
    ttl_s: float
    journal: list[_Committed] = field(default_factory=list)
    holders: tuple[Holder, ...] = ()
    fence: int = 0
    owner: bytes | None = None
    lease_ends_s: float = 0.0

    @property
    def num_bytes(self) -> int:
        journal = sum(entry.num_bytes for entry in self.journal)
        return SESSION_OVERHEAD_BYTES + journal + sum(holder.num_bytes for holder in self.holders)

    def keep_until(self, now_s: float, expires_s: float) -> None:
        self.updated_s, self.expires_s = now_s, expires_s

    def record(self, now_s: float) -> SessionRecord:
        is_running = self.owner is not None and self.lease_ends_s > now_s
        return SessionRecord(
            session_id=self.session_id,
            model=self.model,
            template_digest=self.template_digest,
            created_at_s=self.created_us / 1e6,
            updated_at_s=self.updated_s,
            expires_at_s=self.expires_s,
            ttl_s=self.ttl_s,
            num_turns=len(self.journal),
            num_prompt_tokens=sum(len(entry.turn.prompt_token_ids) for entry in self.journal),
            num_generated_tokens=sum(len(entry.turn.generated_token_ids) for entry in self.journal),
            num_bytes=self.num_bytes,
            holders=self.holders,
            running_turn=len(self.journal) + 1 if is_running else None,
        )


def at_once(call: Coroutine[Any, Any, T]) -> T:
    """What a method of MemorySessionStore returns, for callers without an event loop. Raises what it raises."""
    try:
        call.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("a method of the store in memory waits for something")


class MemorySessionStore:
    """Implements SessionStore. No method awaits anything, so each is atomic in an event loop; one loop at a time.

    clock: Unix seconds.
    """

    def __init__(self, quota_bytes: int | None = None, clock: Callable[[], float] = time.time) -> None:
        self._quota_bytes = quota_bytes
        self._clock = clock
        self._tenants: dict[str, dict[str, _Session]] = {}

    async def create(
        self, tenant: str, session_id: str | None, *, model: str, ttl_s: float, template_digest: str
    ) -> SessionRecord:
        session_id = new_session_id() if session_id is None else session_id
        check_new_session(session_id, ttl_s)
        sessions, now_s = self._living(tenant), self._clock()
        if session_id in sessions:
            raise AlreadyExists("session", session_id)
        self._require_room(tenant, SESSION_OVERHEAD_BYTES)
        newest_us = max((session.created_us for session in sessions.values()), default=0)
        created_us = max(round(now_s * 1e6), newest_us + 1)
        session = _Session(session_id, model, template_digest, created_us, now_s, now_s + ttl_s, ttl_s)
        self._tenants.setdefault(tenant, sessions)[session_id] = session
        return session.record(now_s)

    async def get(self, tenant: str, session_id: str) -> SessionRecord:
        return self._find(tenant, session_id).record(self._clock())

    async def list(self, tenant: str, page_size: int, page_token: str = "") -> RecordPage:
        older_than_us = check_page(page_size, page_token)
        newest_first = sorted(self._living(tenant).values(), key=lambda session: -session.created_us)
        older = [one for one in newest_first if older_than_us is None or one.created_us < older_than_us]
        page = older[:page_size]
        is_last = len(page) < page_size
        now_s = self._clock()
        return RecordPage(tuple(one.record(now_s) for one in page), "" if is_last else str(page[-1].created_us))

    async def delete(self, tenant: str, session_id: str) -> None:
        self._find(tenant, session_id)
        self._forget(tenant, session_id)

    async def acquire(
        self, tenant: str, session_id: str, turn: TurnStart, lease_ttl_s: float
    ) -> Acquired | AlreadyCommitted:
        session, now_s = self._find(tenant, session_id), self._clock()
        first_replayable = max(0, len(session.journal) - NUM_REPLAYABLE_TURNS)
        for number, entry in enumerate(session.journal[first_replayable:], first_replayable + 1):
            if turn.idempotency_key is not None and entry.idempotency_key == turn.idempotency_key:
                return AlreadyCommitted(number, entry.turn, session.record(now_s))
        next_turn = len(session.journal) + 1
        if session.owner is not None and session.lease_ends_s > now_s:
            raise SessionBusy(session_id, next_turn)
        self._require_room(tenant, turn.needed_bytes)

        session.fence = max(round(now_s * 1e6), session.fence + 1)
        session.owner, session.lease_ends_s = new_owner(), now_s + lease_ttl_s
        session.keep_until(now_s, max(now_s + session.ttl_s, session.lease_ends_s))
        lease = Lease(
            tenant=tenant,
            session_id=session_id,
            fence=session.fence,
            turn=next_turn,
            expires_at_s=session.lease_ends_s,
            owner=session.owner,
            idempotency_key=turn.idempotency_key,
        )
        num_known = _num_known(session, turn.known)
        head = session.journal[-1].mark if session.journal else b""
        turns = tuple(entry.turn for entry in session.journal[num_known:])
        return Acquired(lease, session.record(now_s), turns, num_known, JournalPosition(len(session.journal), head))

    async def renew(self, lease: Lease, lease_ttl_s: float) -> Lease:
        session, now_s = self._find_leased(lease), self._clock()
        session.lease_ends_s = now_s + lease_ttl_s
        session.keep_until(now_s, max(now_s + session.ttl_s, session.lease_ends_s))
        return dataclasses.replace(lease, expires_at_s=session.lease_ends_s)

    async def commit(self, lease: Lease, turn: TurnRecord, holders: Sequence[Holder]) -> SessionRecord:
        session, now_s = self._find(lease.tenant, lease.session_id), self._clock()
        if any(entry.mark == lease.owner for entry in session.journal[lease.turn - 1 : lease.turn]):
            return session.record(now_s)
        self._find_leased(lease)
        num_bytes = len(pack_turn(turn, lease.owner))
        held_before, held_now = (sum(one.num_bytes for one in some) for some in (session.holders, holders))
        growth = num_bytes + held_now - held_before
        if growth > 0:
            self._require_room(lease.tenant, growth)
        session.journal.append(_Committed(turn, lease.owner, lease.idempotency_key, num_bytes))
        session.holders = tuple(sorted(holders, key=lambda holder: (holder.replica_id, holder.incarnation)))
        session.owner = None
        session.keep_until(now_s, now_s + session.ttl_s)
        return session.record(now_s)

    async def release(self, lease: Lease) -> None:
        session = self._living(lease.tenant).get(lease.session_id)
        if session is not None and session.owner == lease.owner:
            session.owner = None

    async def remove_holder(self, tenant: str, session_id: str, replica_id: str, incarnation: str) -> None:
        session = self._living(tenant).get(session_id)
        if session is not None:
            gone = (replica_id, incarnation)
            session.holders = tuple(one for one in session.holders if (one.replica_id, one.incarnation) != gone)

    def _living(self, tenant: str) -> dict[str, _Session]:
        now_s, sessions = self._clock(), self._tenants.get(tenant, {})
        for session in [one for one in sessions.values() if one.expires_s <= now_s]:
            self._forget(tenant, session.session_id)
        return self._tenants.get(tenant, {})

    def _forget(self, tenant: str, session_id: str) -> None:
        del self._tenants[tenant][session_id]
        if not self._tenants[tenant]:
            del self._tenants[tenant]

    def _find(self, tenant: str, session_id: str) -> _Session:
        session = self._living(tenant).get(session_id)
        if session is None:
            raise not_found(session_id)
        return session

    def _find_leased(self, lease: Lease) -> _Session:
        session = self._find(lease.tenant, lease.session_id)
        if session.owner != lease.owner or session.fence != lease.fence:
            raise StaleLease(f"the lease on session {lease.session_id!r} has been overtaken, released or committed")
        return session

    def _require_room(self, tenant: str, num_bytes: int) -> None:
        held = sum(session.num_bytes for session in self._living(tenant).values())
        if self._quota_bytes is not None and held + num_bytes > self._quota_bytes:
            raise QuotaExceeded(f"the tenant's sessions hold as many bytes as they may ({self._quota_bytes})")


def _num_known(session: _Session, known: JournalPosition | None) -> int:
    """How many turns the caller has already: none unless its journal is this one so far."""
    if known is None or not 0 < known.num_turns <= len(session.journal):
        return 0
    return known.num_turns if session.journal[known.num_turns - 1].mark == known.head else 0
