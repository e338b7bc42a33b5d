"""Sessions at the gateway: what the edge shows of them, and the lease of the turn that runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from services.common.errors import (
    AntiphonError,
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    SessionBusy,
    StaleLease,
    Unavailable,
)
from services.common.messages import SessionHolder, SessionInfo, SessionPage
from services.common.settings import SessionSettings
from services.common.tasks import to_its_end
from services.gateway.forgetting import Forgetting
from services.sessions.base import (
    MAX_PAGE_SIZE,
    Acquired,
    AlreadyCommitted,
    Holder,
    Lease,
    SessionRecord,
    SessionStore,
    TurnRecord,
    TurnStart,
)

log = logging.getLogger(__name__)

_COMMIT_RETRY_DELAY_S = 0.2
# A client that cancels a turn and comes again at once is faster than the end of the turn: it does not mean two at once.
_BUSY_GRACE_S = 0.5
_BUSY_RETRY_DELAY_S = 0.03


class GatewaySessions:
    """Implements pipeline_api.Sessions. New sessions are of one model and one chat template."""

    def __init__(
        self,
        store: SessionStore,
        settings: SessionSettings,
        model: str,
        template_digest: str,
        forgetting: Forgetting,
    ) -> None:
        self._store = store
        self._forgetting = forgetting
        self._settings = settings
        self._model = model
        self._template_digest = template_digest

    async def create(self, tenant: str, session: str | None, ttl_s: float | None) -> SessionInfo:
        """Raises InvalidRequest, AlreadyExists, QuotaExceeded."""
        ttl_s = self._settings.ttl_s if ttl_s is None else ttl_s
        if ttl_s > self._settings.max_ttl_s:
            raise InvalidRequest("ttl", f"at most {self._settings.max_ttl_s:.0f} seconds")
        record = await self._store.create(
            tenant, session, model=self._model, ttl_s=ttl_s, template_digest=self._template_digest
        )
        return info_of(record)

    async def get(self, tenant: str, session: str) -> SessionInfo:
        """Raises NotFound."""
        return info_of(await self._store.get(tenant, session))

    async def list(self, tenant: str, page_size: int, page_token: str) -> SessionPage:
        """Newest first. Raises InvalidRequest on a page token that is not ours."""
        page = await self._store.list(tenant, min(page_size, MAX_PAGE_SIZE), page_token)
        return SessionPage(tuple(info_of(record) for record in page.sessions), page.next_page_token)

    async def delete(self, tenant: str, session: str) -> None:
        """Raises NotFound, SessionBusy. Whoever holds the session's KV hears of it."""
        acquired, lease_ttl_s = None, self._settings.lease_ttl_s
        with contextlib.suppress(QuotaExceeded):  # of a tenant above its quota all the more
            acquired = await acquire(self._store, tenant, session, TurnStart(), lease_ttl_s)
        assert not isinstance(acquired, AlreadyCommitted), "no idempotency key was given"
        async with TurnLease(self._store, acquired, lease_ttl_s).held():
            await self._store.delete(tenant, session)
        if acquired is not None:
            await self._forgetting.forget(acquired)

    def check_same_model(self, record: SessionRecord) -> None:
        """Raises InvalidRequest for a session whose history another model or another chat template has written."""
        if record.model != self._model:
            raise InvalidRequest("session", f"belongs to the model {record.model!r}; {self._model!r} is served here")
        if record.template_digest and record.template_digest != self._template_digest:
            raise InvalidRequest("session", "was begun under another chat template; begin a new one")


class TurnLease:
    """The right to run one turn: renewed while it is open, released at its end unless the turn was committed.

    None as acquired stands for a turn without a session: nothing to hold, nothing to write.
    """

    def __init__(self, store: SessionStore, acquired: Acquired | None, ttl_s: float) -> None:
        self._store = store
        self._lease: Lease | None = acquired.lease if acquired else None
        self._ttl_s = ttl_s
        self._lost: AntiphonError | None = None
        self._is_committed = False

    @property
    def fence(self) -> int:
        """The fencing token; 0 without a session."""
        return self._lease.fence if self._lease else 0

    @asynccontextmanager
    async def held(self) -> AsyncIterator[TurnLease]:
        """Keeps the lease for the length of the block."""
        if self._lease is None:
            yield self
            return
        keeper = asyncio.create_task(self._keep(self._lease), name="turn lease")
        try:
            yield self
        finally:
            keeper.cancel()
            if not self._is_committed:
                with contextlib.suppress(Unavailable):  # it ends by its TTL then
                    await to_its_end(self._store.release(self._lease))

    def check(self) -> None:
        """Raises StaleLease or NotFound once the session has gone on without this turn, or has been deleted."""
        if self._lost is not None:
            raise self._lost

    async def commit(self, turn: TurnRecord, holders: Sequence[Holder]) -> None:
        """Appends the turn; tries again for as long as a lease lasts while the store does not answer.

        Raises StaleLease, NotFound, QuotaExceeded, Unavailable: nothing was appended then.
        """
        if self._lease is None:
            return
        give_up_s = time.monotonic() + self._ttl_s
        while not self._is_committed:
            try:
                await self._store.commit(self._lease, turn, holders)
                self._is_committed = True
            except Unavailable:
                if time.monotonic() > give_up_s:
                    raise
                await asyncio.sleep(_COMMIT_RETRY_DELAY_S)

    async def _keep(self, lease: Lease) -> None:
        while self._lost is None:
            await asyncio.sleep(self._ttl_s / 3)
            try:
                await self._store.renew(lease, self._ttl_s)
            except Unavailable:
                log.warning("the session store does not answer; a turn goes on without renewing its lease")
            except (StaleLease, NotFound) as error:
                self._lost = error


async def acquire(
    store: SessionStore, tenant: str, session: str, start: TurnStart, lease_ttl_s: float
) -> Acquired | AlreadyCommitted:
    """store.acquire, with a little patience for a turn that is just ending. Raises SessionBusy if it does not."""
    give_up_s = time.monotonic() + _BUSY_GRACE_S
    while True:
        try:
            return await _acquire_once(store, tenant, session, start, lease_ttl_s)
        except SessionBusy:
            if time.monotonic() >= give_up_s:
                raise
            await asyncio.sleep(_BUSY_RETRY_DELAY_S)


async def _acquire_once(
    store: SessionStore, tenant: str, session: str, start: TurnStart, lease_ttl_s: float
) -> Acquired | AlreadyCommitted:
    """Nothing stays held if the caller is cancelled meanwhile."""
    acquiring = asyncio.ensure_future(store.acquire(tenant, session, start, lease_ttl_s))
    try:
        return await asyncio.shield(acquiring)
    except asyncio.CancelledError:
        await to_its_end(_let_go(store, acquiring))
        raise


async def _let_go(store: SessionStore, acquiring: asyncio.Future[Acquired | AlreadyCommitted]) -> None:
    with contextlib.suppress(AntiphonError):
        acquired = await acquiring  # bounded by the store
        if isinstance(acquired, Acquired):
            await store.release(acquired.lease)


def info_of(record: SessionRecord) -> SessionInfo:
    """What its owner sees of a session."""
    return SessionInfo(
        session=record.session_id,
        model=record.model,
        created_at_s=record.created_at_s,
        updated_at_s=record.updated_at_s,
        ttl_s=record.ttl_s,
        num_turns=record.num_turns,
        num_prompt_tokens=record.num_prompt_tokens,
        num_generated_tokens=record.num_generated_tokens,
        holders=tuple(
            SessionHolder(holder.replica_id, holder.num_computed_tokens, holder.tier.value) for holder in record.holders
        ),
        held_bytes=record.num_bytes,
        active_turn=record.running_turn,
    )
