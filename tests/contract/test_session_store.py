"""What every session store does: in memory, on the embedded Valkey, and on Debian's Redis where it is installed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace

import pytest

from services.common.errors import (
    AlreadyExists,
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    SessionBusy,
    StaleLease,
)
from services.common.sampling import FinishReason
from services.sessions.base import (
    SESSION_OVERHEAD_BYTES,
    Acquired,
    AlreadyCommitted,
    Holder,
    JournalPosition,
    Lease,
    SessionRecord,
    SessionStore,
    Tier,
    TurnRecord,
    TurnStart,
)
from services.sessions.embedded import EmbeddedServer
from services.sessions.memory_store import MemorySessionStore
from services.sessions.redis_store import RedisSessionStore
from tests.redis_servers import KINDS, connected, fresh_keyspace, running_server

MakeStore = Callable[[int | None], SessionStore]

START = TurnStart()
LEASE_S = 30.0
TINY_S = 0.02
TURN = TurnRecord((1, 2, 3), (4, 5), FinishReason.STOP, "chat-template")
HOLDER = Holder("decode-0", "boot-1", 5, Tier.GPU, num_bytes=640)


@pytest.fixture(scope="module", params=["memory", *KINDS])
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer | None]:
    if request.param == "memory":
        yield None
    else:
        with running_server(request.param) as started:
            yield started


@pytest.fixture
async def make_store(server: EmbeddedServer | None) -> AsyncIterator[MakeStore]:
    if server is None:
        yield MemorySessionStore
    else:
        async with connected(server.url) as client:
            keyspace = fresh_keyspace()
            yield lambda quota_bytes: RedisSessionStore(client, keyspace, quota_bytes)


@pytest.fixture
def store(make_store: MakeStore) -> SessionStore:
    return make_store(None)


async def make(store: SessionStore, session_id: str | None = "chat", ttl_s: float = 60.0) -> SessionRecord:
    return await store.create("acme", session_id, model="demo", ttl_s=ttl_s, template_digest="chat-template")


async def begin(store: SessionStore, start: TurnStart = START, lease_ttl_s: float = LEASE_S) -> Acquired:
    acquired = await store.acquire("acme", "chat", start, lease_ttl_s)
    assert isinstance(acquired, Acquired)
    return acquired


async def run_turn(store: SessionStore, turn: TurnRecord = TURN, key: str | None = None) -> Lease:
    acquired = await begin(store, TurnStart(idempotency_key=key))
    await store.commit(acquired.lease, turn, [])
    return acquired.lease


def numbered(number: int) -> TurnRecord:
    return TurnRecord((number,), (number + 1000,), FinishReason.LENGTH)


# The session as a resource


async def test_new_session_is_empty_and_can_be_read_back(store: SessionStore) -> None:
    made = await make(store, ttl_s=60.0)
    assert (made.session_id, made.model, made.template_digest) == ("chat", "demo", "chat-template")
    assert (made.num_turns, made.num_tokens, made.holders, made.running_turn) == (0, 0, (), None)
    assert made.num_bytes == SESSION_OVERHEAD_BYTES
    assert made.expires_at_s - made.updated_at_s == pytest.approx(60.0, abs=0.01)
    assert await store.get("acme", "chat") == made


async def test_session_without_an_id_gets_a_random_one(store: SessionStore) -> None:
    one, other = await make(store, None), await make(store, None)
    assert one.session_id != other.session_id
    assert await store.get("acme", one.session_id) == one


async def test_same_id_can_be_taken_once_a_tenant(store: SessionStore) -> None:
    await make(store)
    with pytest.raises(AlreadyExists):
        await make(store)
    await store.create("other", "chat", model="demo", ttl_s=60.0, template_digest="")


@pytest.mark.parametrize("session_id", ["", "a b", "{a}", "a:b", "*", "a\r\n", "é", "-a", "x" * 129])
async def test_refuses_ids_that_are_no_plain_names(store: SessionStore, session_id: str) -> None:
    with pytest.raises(InvalidRequest, match="session_id"):
        await make(store, session_id)
    with pytest.raises(NotFound):
        await store.get("acme", session_id)


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, float("nan"), float("inf")])
async def test_refuses_a_ttl_that_is_none(store: SessionStore, ttl_s: float) -> None:
    with pytest.raises(InvalidRequest, match="ttl"):
        await make(store, ttl_s=ttl_s)


async def test_session_of_another_tenant_looks_like_one_that_does_not_exist(store: SessionStore) -> None:
    await make(store)
    attempts: list[Callable[[str], Awaitable[object]]] = [
        lambda name: store.get("other", name),
        lambda name: store.delete("other", name),
        lambda name: store.acquire("other", name, START, LEASE_S),
    ]
    for attempt in attempts:
        with pytest.raises(NotFound) as of_another:
            await attempt("chat")
        with pytest.raises(NotFound) as of_nobody:
            await attempt("chat2")
        assert str(of_another.value).replace("chat", "chat2") == str(of_nobody.value)
    assert (await store.list("other", 10)).sessions == ()


async def test_list_pages_through_all_sessions_newest_first(store: SessionStore) -> None:
    names = [f"chat-{number}" for number in range(7)]
    for name in names:
        await make(store, name)
    seen, token, num_pages = [], "", 0
    while num_pages == 0 or token:
        page = await store.list("acme", 3, token)
        seen += [session.session_id for session in page.sessions]
        token, num_pages = page.next_page_token, num_pages + 1
    assert seen == names[::-1]
    assert num_pages == 3


async def test_sessions_made_or_deleted_between_pages_shift_no_page(store: SessionStore) -> None:
    for number in range(4):
        await make(store, f"chat-{number}")
    first = await store.list("acme", 2)
    await make(store, "newer")
    await store.delete("acme", "chat-2")
    second = await store.list("acme", 2, first.next_page_token)
    assert [session.session_id for session in second.sessions] == ["chat-1", "chat-0"]


@pytest.mark.parametrize(("page_size", "page_token"), [(0, ""), (1001, ""), (1, "x"), (1, "1" * 17), (1, "-1")])
async def test_refuses_impossible_pages(store: SessionStore, page_size: int, page_token: str) -> None:
    with pytest.raises(InvalidRequest, match="page_"):
        await store.list("acme", page_size, page_token)


async def test_deleted_session_is_gone_and_its_id_is_free(store: SessionStore) -> None:
    await make(store)
    await run_turn(store)
    await store.delete("acme", "chat")
    with pytest.raises(NotFound):
        await store.get("acme", "chat")
    with pytest.raises(NotFound):
        await store.delete("acme", "chat")
    assert (await store.list("acme", 10)).sessions == ()
    assert (await make(store)).num_turns == 0
    assert (await begin(store)).turns == ()


# A turn


async def test_acquire_brings_the_journal_and_the_holders(store: SessionStore) -> None:
    await make(store)
    first = await begin(store)
    assert (first.lease.turn, first.turns, first.position) == (1, (), JournalPosition(0, b""))
    committed = await store.commit(first.lease, TURN, [HOLDER])
    assert (committed.num_prompt_tokens, committed.num_generated_tokens) == (3, 2)
    assert committed.running_turn is None

    second = await begin(store)
    assert second.lease.turn == 2
    assert second.turns == (TURN,)
    assert second.session.holders == (HOLDER,)
    assert second.session.running_turn == 2
    assert second.position == first.lease.position_after_commit


async def test_token_ids_come_back_as_they_were(store: SessionStore) -> None:
    await make(store)
    turn = TurnRecord(tuple(range(100_000)), (0, 2**32 - 1), FinishReason.LENGTH, "ü")
    await run_turn(store, turn)
    assert (await begin(store)).turns == (turn,)


async def test_token_id_that_does_not_fit_is_refused_and_nothing_changes(store: SessionStore) -> None:
    await make(store)
    acquired = await begin(store)
    for token_id in (-1, 2**32):
        with pytest.raises(InvalidRequest, match="token_ids"):
            await store.commit(acquired.lease, replace(TURN, prompt_token_ids=(token_id,)), [])
    assert (await store.commit(acquired.lease, TURN, [])).num_turns == 1


async def test_acquire_sends_only_turns_that_the_caller_lacks(store: SessionStore) -> None:
    await make(store)
    leases = [await run_turn(store, numbered(number)) for number in range(3)]
    for num_known, lease in enumerate(leases, 1):
        acquired = await begin(store, TurnStart(known=lease.position_after_commit))
        assert acquired.num_known_turns == num_known
        assert acquired.turns == tuple(numbered(number) for number in range(num_known, 3))
        assert acquired.position == leases[-1].position_after_commit
        await store.release(acquired.lease)


async def test_position_in_another_journal_is_not_taken_for_known(store: SessionStore) -> None:
    await make(store)
    stale = (await run_turn(store, numbered(0))).position_after_commit
    await store.delete("acme", "chat")
    await make(store)
    await run_turn(store, numbered(7))
    for known in (stale, JournalPosition(5, stale.head), JournalPosition(1, b"")):
        acquired = await begin(store, TurnStart(known=known))
        assert (acquired.num_known_turns, acquired.turns) == (0, (numbered(7),))
        await store.release(acquired.lease)


async def test_second_turn_is_refused_while_one_runs_and_is_told_which(store: SessionStore) -> None:
    await make(store)
    await run_turn(store)
    acquired = await begin(store)
    with pytest.raises(SessionBusy) as busy:
        await begin(store)
    assert (busy.value.session, busy.value.turn) == ("chat", 2)
    await store.release(acquired.lease)
    assert (await begin(store)).lease.turn == 2


async def test_released_turn_leaves_nothing_in_the_journal(store: SessionStore) -> None:
    await make(store)
    acquired = await begin(store)
    await store.release(acquired.lease)
    assert (await store.get("acme", "chat")).num_turns == 0
    with pytest.raises(StaleLease):
        await store.commit(acquired.lease, TURN, [])
    with pytest.raises(StaleLease):
        await store.renew(acquired.lease, LEASE_S)
    await store.release(acquired.lease)


async def test_renewed_lease_is_kept_past_its_first_end(store: SessionStore) -> None:
    await make(store)
    acquired = await begin(store, lease_ttl_s=TINY_S)
    renewed = await store.renew(acquired.lease, LEASE_S)
    assert renewed.expires_at_s > acquired.lease.expires_at_s
    await asyncio.sleep(2 * TINY_S)
    with pytest.raises(SessionBusy):
        await begin(store)
    assert (await store.commit(renewed, TURN, [])).num_turns == 1


async def test_lease_that_ran_out_can_be_overtaken_and_its_writes_change_nothing(store: SessionStore) -> None:
    await make(store)
    slow = await begin(store, lease_ttl_s=TINY_S)
    await asyncio.sleep(2 * TINY_S)
    assert (await store.get("acme", "chat")).running_turn is None
    fast = await begin(store)
    assert fast.lease.fence > slow.lease.fence
    before = await store.get("acme", "chat")
    with pytest.raises(StaleLease):
        await store.commit(slow.lease, numbered(666), [HOLDER])
    with pytest.raises(StaleLease):
        await store.renew(slow.lease, LEASE_S)
    await store.release(slow.lease)
    assert await store.get("acme", "chat") == before
    await store.commit(fast.lease, TURN, [])
    with pytest.raises(StaleLease):
        await store.commit(slow.lease, numbered(666), [HOLDER])
    assert (await begin(store)).turns == (TURN,)


async def test_lease_that_ran_out_but_was_not_overtaken_can_still_commit(store: SessionStore) -> None:
    await make(store)
    acquired = await begin(store, lease_ttl_s=TINY_S)
    await asyncio.sleep(2 * TINY_S)
    assert (await store.commit(acquired.lease, TURN, [])).num_turns == 1


async def test_forged_fence_is_refused(store: SessionStore) -> None:
    await make(store)
    lease = (await begin(store)).lease
    for forged in (replace(lease, fence=lease.fence + 1), replace(lease, owner=bytes(16))):
        with pytest.raises(StaleLease):
            await store.commit(forged, TURN, [])


async def test_fences_grow_even_when_the_session_is_made_anew(store: SessionStore) -> None:
    fences = []
    for _ in range(3):
        await make(store)
        for _ in range(3):
            acquired = await begin(store)
            fences.append(acquired.lease.fence)
            await store.release(acquired.lease)
        await store.delete("acme", "chat")
    assert fences == sorted(set(fences))


async def test_turn_on_a_deleted_session_cannot_commit(store: SessionStore) -> None:
    await make(store)
    acquired = await begin(store)
    await store.delete("acme", "chat")
    with pytest.raises(NotFound):
        await store.commit(acquired.lease, TURN, [])
    await store.release(acquired.lease)
    await make(store)
    with pytest.raises(StaleLease):
        await store.commit(acquired.lease, TURN, [])


async def test_repeated_commit_appends_once(store: SessionStore) -> None:
    await make(store)
    lease = await run_turn(store)
    assert (await store.commit(lease, TURN, [])).num_turns == 1
    await run_turn(store)
    assert (await store.commit(lease, TURN, [])).num_turns == 2


# Idempotency


async def test_turn_with_a_known_idempotency_key_is_brought_back_instead_of_run(store: SessionStore) -> None:
    await make(store)
    await run_turn(store, numbered(0), "key-0")
    await run_turn(store, numbered(1), "key-1")
    again = await store.acquire("acme", "chat", TurnStart(idempotency_key="key-0"), LEASE_S)
    assert isinstance(again, AlreadyCommitted)
    assert (again.turn, again.record, again.session.num_turns) == (1, numbered(0), 2)
    assert (await begin(store)).lease.turn == 3


async def test_idempotency_key_is_forgotten_after_four_turns(store: SessionStore) -> None:
    await make(store)
    await run_turn(store, numbered(0), "key")
    for number in range(1, 4):
        await run_turn(store, numbered(number))
    assert isinstance(await store.acquire("acme", "chat", TurnStart("key"), LEASE_S), AlreadyCommitted)
    await run_turn(store, numbered(4))
    assert isinstance(await store.acquire("acme", "chat", TurnStart("key"), LEASE_S), Acquired)


async def test_idempotency_key_of_a_running_or_failed_turn_brings_nothing_back(store: SessionStore) -> None:
    await make(store)
    acquired = await begin(store, TurnStart("key"))
    with pytest.raises(SessionBusy):
        await begin(store, TurnStart("key"))
    await store.release(acquired.lease)
    assert (await begin(store, TurnStart("key"))).lease.turn == 1


@pytest.mark.parametrize("key", ["", "x" * 129])
def test_refuses_an_idempotency_key_of_impossible_length(key: str) -> None:
    with pytest.raises(InvalidRequest, match="idempotency_key"):
        TurnStart(idempotency_key=key)


# Holders


async def test_commit_replaces_the_holders(store: SessionStore) -> None:
    await make(store)
    moved = Holder("decode:1", "boot-9", 10, Tier.CPU, num_bytes=64)
    await store.commit((await begin(store)).lease, TURN, [HOLDER, moved])
    assert (await store.get("acme", "chat")).holders == (HOLDER, moved)
    await store.commit((await begin(store)).lease, TURN, [moved])
    assert (await store.get("acme", "chat")).holders == (moved,)


async def test_removed_holder_gives_its_bytes_back(store: SessionStore) -> None:
    await make(store)
    before = await store.commit((await begin(store)).lease, TURN, [HOLDER])
    await store.remove_holder("acme", "chat", "decode-0", "boot-2")
    assert await store.get("acme", "chat") == before
    for _ in range(2):
        await store.remove_holder("acme", "chat", "decode-0", "boot-1")
        after = await store.get("acme", "chat")
        assert after.holders == ()
        assert after.num_bytes == before.num_bytes - HOLDER.num_bytes
    await store.remove_holder("acme", "no-such-session", "decode-0", "boot-1")


# Quota


async def test_quota_bounds_the_number_of_sessions(make_store: MakeStore) -> None:
    store = make_store(2 * SESSION_OVERHEAD_BYTES)
    await make(store, "a")
    await make(store, "b")
    with pytest.raises(QuotaExceeded):
        await make(store, "c")
    await store.create("other", "c", model="demo", ttl_s=60.0, template_digest="")
    await store.delete("acme", "a")
    await make(store, "c")


async def test_turn_that_needs_more_than_is_left_is_refused_before_any_work(make_store: MakeStore) -> None:
    store = make_store(SESSION_OVERHEAD_BYTES + 1000)
    await make(store)
    with pytest.raises(QuotaExceeded):
        await begin(store, TurnStart(needed_bytes=1001))
    assert (await store.get("acme", "chat")).running_turn is None
    await begin(store, TurnStart(needed_bytes=1000))


async def test_commit_over_quota_changes_nothing_and_keeps_the_lease(make_store: MakeStore) -> None:
    store = make_store(SESSION_OVERHEAD_BYTES + 600)
    await make(store)
    lease = (await begin(store)).lease
    before = await store.get("acme", "chat")
    with pytest.raises(QuotaExceeded):
        await store.commit(lease, TURN, [HOLDER])
    assert await store.get("acme", "chat") == before
    assert before.running_turn == 1
    assert (await store.commit(lease, TURN, [replace(HOLDER, num_bytes=0)])).num_turns == 1


async def test_expired_session_gives_its_bytes_back(make_store: MakeStore) -> None:
    store = make_store(2 * SESSION_OVERHEAD_BYTES)
    await make(store, "a", ttl_s=TINY_S)
    await make(store, "b", ttl_s=TINY_S)
    await asyncio.sleep(1.1)  # a store may take a second to notice
    await make(store, "c")
    await make(store, "d")
    assert len((await store.list("acme", 10)).sessions) == 2


async def test_expired_session_can_be_made_anew_at_once(make_store: MakeStore) -> None:
    store = make_store(SESSION_OVERHEAD_BYTES)
    await make(store, ttl_s=TINY_S)
    await asyncio.sleep(2 * TINY_S)
    await make(store)
    assert [session.session_id for session in (await store.list("acme", 10)).sessions] == ["chat"]


# Life


async def test_session_ends_after_its_ttl_without_use(store: SessionStore) -> None:
    await make(store, ttl_s=TINY_S)
    await asyncio.sleep(2 * TINY_S)
    with pytest.raises(NotFound):
        await store.get("acme", "chat")
    with pytest.raises(NotFound):
        await begin(store)
    assert (await store.list("acme", 10)).sessions == ()


async def test_turns_prolong_a_session_and_looking_at_it_does_not(store: SessionStore) -> None:
    made = await make(store, ttl_s=60.0)
    await asyncio.sleep(TINY_S)
    await store.list("acme", 10)
    assert (await store.get("acme", "chat")).expires_at_s == made.expires_at_s
    acquired = await begin(store, lease_ttl_s=1.0)
    assert acquired.session.expires_at_s > made.expires_at_s
    await asyncio.sleep(TINY_S)
    committed = await store.commit(acquired.lease, TURN, [])
    assert committed.expires_at_s > acquired.session.expires_at_s


async def test_session_outlives_its_ttl_while_a_turn_runs(store: SessionStore) -> None:
    await make(store, ttl_s=0.5)
    acquired = await begin(store)
    await asyncio.sleep(0.6)
    assert (await store.commit(acquired.lease, TURN, [])).num_turns == 1
    await asyncio.sleep(0.6)
    with pytest.raises(NotFound):
        await store.get("acme", "chat")
