"""The session store while its server is gone, hung, full, restarted, or loses replies; and what is left in it then."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

import pytest
from redis.asyncio import Redis

from services.common.errors import NotFound, SessionBusy, Unavailable
from services.common.sampling import FinishReason
from services.sessions.base import Acquired, Holder, SessionStore, TurnRecord, TurnStart
from services.sessions.breaker import LONGEST_PAUSE_S
from services.sessions.embedded import EmbeddedServer
from services.sessions.keys import Keyspace
from services.sessions.redis_store import RedisSessionStore
from tests.redis_servers import KINDS, LossyProxy, connected, fresh_keyspace, running_server

TURN = TurnRecord((1, 2, 3), (4, 5), FinishReason.STOP)
HOLDER = Holder("decode-0", "boot-1", 5, num_bytes=64)
NO_HANG_S = 2.0
T = TypeVar("T")


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    with running_server(request.param) as started:
        yield started


@pytest.fixture
async def client(server: EmbeddedServer) -> AsyncIterator[Redis]:
    async with connected(server.url) as client:
        yield client


@pytest.fixture
def keyspace() -> Keyspace:
    return fresh_keyspace()


@pytest.fixture
def store(client: Redis, keyspace: Keyspace) -> RedisSessionStore:
    return RedisSessionStore(client, keyspace)


async def make(store: SessionStore, session_id: str = "chat", ttl_s: float = 60.0) -> None:
    await store.create("acme", session_id, model="demo", ttl_s=ttl_s, template_digest="")


async def begin(store: SessionStore, session_id: str = "chat") -> Acquired:
    acquired = await store.acquire("acme", session_id, TurnStart(), 30.0)
    assert isinstance(acquired, Acquired)
    return acquired


async def once_back(attempt: Callable[[], Awaitable[T]]) -> T:
    """The answer of a store that is there again: callers are refused until it has been looked at."""
    async with asyncio.timeout(NO_HANG_S + LONGEST_PAUSE_S):
        while True:
            try:
                return await attempt()
            except Unavailable:
                await asyncio.sleep(0.02)


async def refuses_everything(store: SessionStore, running: Acquired) -> None:
    """Each method says Unavailable, soon."""
    for attempt in (
        make(store, "another"),
        store.get("acme", "chat"),
        store.list("acme", 10),
        store.delete("acme", "chat"),
        store.acquire("acme", "chat", TurnStart(), 30.0),
        store.renew(running.lease, 30.0),
        store.commit(running.lease, TURN, []),
        store.release(running.lease),
        store.remove_holder("acme", "chat", "decode-0", "boot-1"),
    ):
        with pytest.raises(Unavailable):
            await asyncio.wait_for(attempt, NO_HANG_S)


async def test_restarted_server_has_all_that_it_acknowledged(server: EmbeddedServer, store: SessionStore) -> None:
    await make(store)
    await store.commit((await begin(store)).lease, TURN, [HOLDER])
    running = await begin(store)
    before = await store.get("acme", "chat")
    server.stop()
    await refuses_everything(store, running)
    server.start()
    assert await once_back(lambda: store.get("acme", "chat")) == before
    assert (await store.commit(running.lease, TURN, [])).num_turns == 2


async def test_hung_server_makes_no_call_hang(server: EmbeddedServer, store: SessionStore) -> None:
    await make(store)
    running = await begin(store)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(Unavailable):
            await asyncio.wait_for(store.get("acme", "chat"), NO_HANG_S)
        many = (asyncio.wait_for(store.get("acme", "chat"), NO_HANG_S) for _ in range(200))
        assert all(isinstance(one, Unavailable) for one in await asyncio.gather(*many, return_exceptions=True))
        # From now on nobody waits for it: a hundred calls, one after another, in the time that one would take.
        async with asyncio.timeout(NO_HANG_S):
            for _ in range(100):
                with pytest.raises(Unavailable):
                    await store.get("acme", "chat")
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert (await once_back(lambda: store.commit(running.lease, TURN, []))).num_turns == 1


async def test_full_server_takes_nothing_by_halves_and_can_be_emptied(client: Redis, store: SessionStore) -> None:
    for name in ("chat", "other"):
        await make(store, name)
    running, failed = await begin(store), await begin(store, "other")
    before = await store.get("acme", "chat")
    await client.config_set("maxmemory", "1mb")
    for attempt in (make(store, "third"), store.commit(running.lease, TURN, [HOLDER]), store.renew(running.lease, 9.0)):
        with pytest.raises(Unavailable):
            await attempt
    assert await store.get("acme", "chat") == before
    await store.release(failed.lease)
    await store.delete("acme", "other")
    await client.config_set("maxmemory", 0)
    assert (await store.commit(running.lease, TURN, [HOLDER])).num_turns == 1


async def test_server_that_forgot_the_scripts_gets_them_again(client: Redis, store: SessionStore) -> None:
    await make(store)
    await client.script_flush()
    assert (await begin(store)).lease.turn == 1


async def test_change_whose_reply_was_lost_is_done_once(server: EmbeddedServer, keyspace: Keyspace) -> None:
    async with LossyProxy(server.url) as proxy, connected(proxy.url) as client:
        store = RedisSessionStore(client, keyspace)
        await make(store, "warm-up")
        await begin(store, "warm-up")
        proxy.lose_next_reply()
        await make(store)
        proxy.lose_next_reply()
        acquired = await begin(store)
        assert acquired.lease.turn == 1
        with pytest.raises(SessionBusy):
            await begin(store)
        proxy.lose_next_reply()
        await store.renew(acquired.lease, 30.0)
        await store.commit(acquired.lease, TURN, [HOLDER])  # the script is known to the server from here on
        again = await begin(store)
        proxy.lose_next_reply()
        assert (await store.commit(again.lease, TURN, [HOLDER])).num_turns == 2
        assert (await begin(store)).turns == (TURN, TURN)


async def test_call_given_up_midway_does_not_mix_up_later_answers(store: SessionStore) -> None:
    names = [f"chat-{number}" for number in range(10)]
    for name in names:
        await make(store, name)
    rng = random.Random(3)
    for _ in range(60):
        task = asyncio.create_task(store.get("acme", rng.choice(names)))
        await asyncio.sleep(rng.uniform(0, 0.001))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        name = rng.choice(names)
        assert (await store.get("acme", name)).session_id == name


async def test_nothing_is_left_behind_when_all_sessions_have_ended(
    client: Redis, store: SessionStore, keyspace: Keyspace
) -> None:
    for number in range(30):
        name = f"chat-{number}"
        await make(store, name, ttl_s=0.5)
        acquired = await store.acquire("acme", name, TurnStart("key"), 0.5)
        assert isinstance(acquired, Acquired)
        await store.commit(acquired.lease, TURN, [HOLDER])
    keys = [key async for key in client.scan_iter(match=f"{keyspace.pattern.removesuffix('*')}*")]
    assert keys
    assert all([await client.pttl(key) > 0 or not await client.exists(key) for key in keys])
    await asyncio.sleep(1.7)
    assert (await store.list("acme", 10)).sessions == ()
    assert [key async for key in client.scan_iter()] == []


async def test_neither_keys_nor_digests_name_anybody(client: Redis, store: SessionStore) -> None:
    await store.create("Tenant-Name", "Session-Name", model="demo", ttl_s=60, template_digest="")
    started = await store.acquire("Tenant-Name", "Session-Name", TurnStart("Idempotency-Key"), 30.0)
    assert isinstance(started, Acquired)
    await store.commit(started.lease, TURN, [])
    keys = [key async for key in client.scan_iter()]
    for name in (b"Tenant", b"Session-Name", b"Idempotency"):
        assert not any(name in key for key in keys)
    values = b"".join([await client.dump(key) or b"" for key in keys])
    assert b"Tenant" not in values
    assert b"Idempotency" not in values


async def test_two_deployments_on_one_server_see_nothing_of_each_other(client: Redis, keyspace: Keyspace) -> None:
    await make(RedisSessionStore(client, keyspace))
    for other in (Keyspace(keyspace.cluster, bytes(16)), Keyspace("another", keyspace.secret)):
        with pytest.raises(NotFound):
            await RedisSessionStore(client, other).get("acme", "chat")
