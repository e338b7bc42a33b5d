"""What a session store does, and the records it speaks in.

A session is a journal of turns, the holders of its KV blocks and at most one running turn. The running turn is a lease
with a fencing token:

    acquired = await store.acquire(tenant, session_id, TurnStart(idempotency_key=key), lease_ttl_s=15)
    ...                                             # renew(lease) at a third of its TTL while the turn runs
    await store.commit(acquired.lease, turn, holders)      # or release(lease) when the turn failed

A commit is accepted while no newer lease exists, even if its own TTL has run out: another turn overtakes a turn, a slow
clock does not. Every time in here is the store's own clock; a client compares none of them with its own.
Progress of a running turn is not recorded: the gateway has the tokens that it sent in memory, so a lost replica is made
good from there, and a lost gateway loses its client's stream with it. It would cost a write for every chunk of tokens.
"""

from __future__ import annotations

import enum
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.common.errors import InvalidRequest, NotFound
from services.common.sampling import FinishReason

MAX_PAGE_SIZE = 1000
MAX_TTL_S = 10 * 365 * 86400.0
MAX_IDEMPOTENCY_KEY_CHARS = 128
NUM_REPLAYABLE_TURNS = 4  # how many of the last turns an idempotency key can still bring back
SESSION_OVERHEAD_BYTES = 1024  # charged for a session's record, so that empty sessions are not free
_SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Tier(enum.Enum):
    """Where a holder keeps the blocks."""

    GPU = "gpu"
    CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Holder:
    """A replica's process that holds KV blocks of a session's first num_computed_tokens tokens: a hint, not a promise.

    incarnation: of the process; one that restarted holds nothing. num_bytes: what its blocks take.
    """

    replica_id: str
    incarnation: str
    num_computed_tokens: int
    tier: Tier = Tier.GPU
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """One turn of the journal, as it was computed: token ids are those fed and sampled, never re-tokenized text.

    prompt_token_ids: new in this turn. template_digest: of the chat template that rendered them; empty for raw tokens.
    """

    prompt_token_ids: tuple[int, ...]
    generated_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    template_digest: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.generated_token_ids)


@dataclass(frozen=True, slots=True)
class JournalPosition:
    """A place in one particular journal: after num_turns turns, the last of which carries the mark head (16 bytes).

    Marks are random, so the position of a journal that was deleted, or lost turns in a failover, fits no other.
    """

    num_turns: int
    head: bytes


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session as others see it. Times are Unix seconds; running_turn is the turn that has a live lease now."""

    session_id: str
    model: str
    template_digest: str
    created_at_s: float
    updated_at_s: float
    expires_at_s: float
    ttl_s: float
    num_turns: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_bytes: int
    holders: tuple[Holder, ...]
    running_turn: int | None

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_generated_tokens


@dataclass(frozen=True, slots=True)
class RecordPage:
    """Some sessions, newest first; next_page_token is empty on the last page."""

    sessions: tuple[SessionRecord, ...]
    next_page_token: str


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run turn number `turn` (from 1) on a session. fence grows with every lease of the session."""

    tenant: str
    session_id: str
    fence: int
    turn: int
    expires_at_s: float
    owner: bytes
    idempotency_key: str | None

    @property
    def position_after_commit(self) -> JournalPosition:
        """Where the journal ends once this lease's turn is committed."""
        return JournalPosition(self.turn, self.owner)


@dataclass(frozen=True, slots=True)
class TurnStart:
    """What is said when a turn begins.

    idempotency_key: a repeated one brings the committed turn back instead of running it again.
    needed_bytes: what the turn will take at most (journal and blocks): too little quota is refused before any work.
    known: how far the caller has the journal already; only what comes after it is sent.
    """

    idempotency_key: str | None = None
    needed_bytes: int = 0
    known: JournalPosition | None = None

    def __post_init__(self) -> None:
        key = self.idempotency_key
        if key is not None and not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY_CHARS:
            raise InvalidRequest("idempotency_key", f"1 to {MAX_IDEMPOTENCY_KEY_CHARS} characters are needed")


@dataclass(frozen=True, slots=True)
class Acquired:
    """The turn may run. turns: the journal after its first num_known_turns turns, which the caller has already."""

    lease: Lease
    session: SessionRecord
    turns: tuple[TurnRecord, ...]
    num_known_turns: int
    position: JournalPosition


@dataclass(frozen=True, slots=True)
class AlreadyCommitted:
    """The turn of this idempotency key was committed before: here it is. No lease is held."""

    turn: int
    record: TurnRecord
    session: SessionRecord


class SessionStore(Protocol):
    """Sessions of all tenants. Each method is atomic and one round trip; only list, which changes nothing, takes two.

    All raise Unavailable within two seconds if the store cannot be reached; all but create raise NotFound for a session
    that does not exist, has expired or is another tenant's (the three look the same), unless said otherwise.
    """

    async def create(
        self, tenant: str, session_id: str | None, *, model: str, ttl_s: float, template_digest: str
    ) -> SessionRecord:
        """Makes an empty session that lives until ttl_s after its last use; without an id it gets a random one.

        Raises InvalidRequest, AlreadyExists, QuotaExceeded.
        """

    async def get(self, tenant: str, session_id: str) -> SessionRecord:
        """The session as it is. Does not prolong its life."""

    async def list(self, tenant: str, page_size: int, page_token: str = "") -> RecordPage:
        """The tenant's sessions, newest first. Does not prolong their lives. Raises InvalidRequest, never NotFound."""

    async def delete(self, tenant: str, session_id: str) -> None:
        """Forgets the session and gives its bytes back. A running turn on it can no longer commit."""

    async def acquire(
        self, tenant: str, session_id: str, turn: TurnStart, lease_ttl_s: float
    ) -> Acquired | AlreadyCommitted:
        """Begins a turn, with all that the turn needs to know. Raises SessionBusy, QuotaExceeded."""

    async def renew(self, lease: Lease, lease_ttl_s: float) -> Lease:
        """Lets the lease end lease_ttl_s from now. Raises StaleLease if it was overtaken, released or committed."""

    async def commit(self, lease: Lease, turn: TurnRecord, holders: Sequence[Holder]) -> SessionRecord:
        """Appends the turn, replaces the holders and releases the lease: all of it or nothing. May be repeated.

        Raises StaleLease; and QuotaExceeded, with the lease still held: fewer holder bytes may fit.
        """

    async def release(self, lease: Lease) -> None:
        """Ends the lease and appends nothing. Changes nothing, and raises nothing, if the lease is no longer held."""

    async def remove_holder(self, tenant: str, session_id: str, replica_id: str, incarnation: str) -> None:
        """Forgets a holder and gives its bytes back. Raises nothing if there is none, or no such session."""


def new_session_id() -> str:
    """A session id that nobody can guess."""
    return secrets.token_hex(16)


def new_owner() -> bytes:
    """16 random bytes: they tell one lease from all others, and mark the turn that it commits."""
    return secrets.token_bytes(16)


def check_new_session(session_id: str, ttl_s: float) -> None:
    """Raises InvalidRequest unless a session may be called that and live so long."""
    if not _SESSION_ID.fullmatch(session_id):
        raise InvalidRequest(
            "session_id", "1 to 128 letters, digits, '.', '_' or '-' are needed, a letter or digit first"
        )
    if not 0 < ttl_s <= MAX_TTL_S:
        raise InvalidRequest("ttl", f"must be more than 0 and at most {MAX_TTL_S:.0f} seconds")


def check_page(page_size: int, page_token: str) -> int | None:
    """The creation time in microseconds after which a page begins, or None for the first. Raises InvalidRequest."""
    if not 1 <= page_size <= MAX_PAGE_SIZE:
        raise InvalidRequest("page_size", f"must be from 1 to {MAX_PAGE_SIZE}, got {page_size}")
    if not page_token:
        return None
    if not re.fullmatch(r"[0-9]{1,16}", page_token):
        raise InvalidRequest("page_token", "is not one that was given out")
    return int(page_token)


def not_found(session_id: str) -> NotFound:
    """The one error for a session that is not there for this tenant."""
    return NotFound("session", session_id)
