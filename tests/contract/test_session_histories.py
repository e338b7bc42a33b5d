"""Two searches for a history that must not be: many gateways on one session, and Redis beside the memory store."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from services.common.errors import AntiphonError, SessionBusy, StaleLease, Unavailable
from services.common.sampling import FinishReason
from services.sessions.base import (
    Acquired,
    AlreadyCommitted,
    Holder,
    Lease,
    RecordPage,
    SessionRecord,
    SessionStore,
    Tier,
    TurnRecord,
    TurnStart,
)
from services.sessions.connect import RedisSettings, connect
from services.sessions.embedded import EmbeddedServer
from services.sessions.memory_store import MemorySessionStore
from services.sessions.redis_store import RedisSessionStore
from tests.redis_servers import KINDS, LossyProxy, connected, fresh_keyspace, running_server


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    with running_server(request.param) as started:
        yield started


@dataclass
class History:
    """What every client saw, in the order in which it saw it; the index of an event is its time."""

    next_time: int = 0
    fences: list[tuple[int, int, int]] = field(default_factory=list)  # fence, asked at, granted at
    accepted: list[tuple[int, int, int]] = field(default_factory=list)  # fence, turn, asked at
    unknown: list[tuple[int, int]] = field(default_factory=list)  # fence, turn: the answer was lost
    num_refused: int = 0

    def tick(self) -> int:
        self.next_time += 1
        return self.next_time


def turn_of(lease: Lease) -> TurnRecord:
    return TurnRecord((lease.turn,), (lease.fence % 2**32, lease.fence >> 32), FinishReason.STOP)


def fence_of(turn: TurnRecord) -> int:
    low, high = turn.generated_token_ids
    return low + (high << 32)


async def gateway(store: SessionStore, history: History, rng: random.Random, num_turns: int) -> None:
    """Runs turns with leases so short that they are overtaken again and again, and writes late on purpose."""
    for _ in range(num_turns):
        asked = history.tick()
        try:
            acquired = await store.acquire("acme", "chat", TurnStart(), rng.choice([0.001, 0.004, 0.05]))
        except (SessionBusy, Unavailable):
            await asyncio.sleep(rng.uniform(0, 0.004))
            continue
        assert isinstance(acquired, Acquired)
        lease = acquired.lease
        history.fences.append((lease.fence, asked, history.tick()))
        await asyncio.sleep(rng.choice([0, 0, 0.002, 0.008]))
        asked = history.tick()
        try:
            if rng.random() < 0.2:
                await store.release(lease)
                continue
            await store.commit(lease, turn_of(lease), [])
        except StaleLease:
            history.num_refused += 1
        except Unavailable:
            history.unknown.append((lease.fence, lease.turn))
        else:
            history.accepted.append((lease.fence, lease.turn, asked))


def check(history: History, journal: tuple[TurnRecord, ...]) -> None:
    fences = [fence for fence, _, _ in history.fences]
    assert len(set(fences)) == len(fences), "one owner a fence"
    in_order_of_grant = sorted(history.fences, key=lambda event: event[2])
    for i, (fence, asked, _) in enumerate(in_order_of_grant):
        assert all(fence > earlier for earlier, _, granted in in_order_of_grant[:i] if granted < asked), "fences grow"
    for fence, _, asked in history.accepted:
        assert not any(other > fence and granted < asked for other, _, granted in history.fences), "an old fence wrote"

    written = [(fence_of(turn), turn.prompt_token_ids[0]) for turn in journal]
    accepted = {(fence, turn) for fence, turn, _ in history.accepted}
    assert accepted <= set(written), "an acknowledged turn was lost"
    assert set(written) <= accepted | set(history.unknown), "a refused turn was written"
    assert [turn for _, turn in written] == list(range(1, len(journal) + 1)), "a gap, or a turn twice"
    assert [fence for fence, _ in written] == sorted(fence for fence, _ in written), "an old fence wrote late"


async def journal_of(store: SessionStore) -> tuple[TurnRecord, ...]:
    await asyncio.sleep(0.06)  # past the last lease
    acquired = await store.acquire("acme", "chat", TurnStart(), 1.0)
    assert isinstance(acquired, Acquired)
    return acquired.turns


@pytest.mark.parametrize("seed", range(4))
async def test_many_gateways_on_one_session_never_break_the_fences(server: EmbeddedServer, seed: int) -> None:
    rng, history = random.Random(seed), History()
    async with connected(server.url) as one, connected(server.url) as other:
        keyspace = fresh_keyspace()
        stores = [RedisSessionStore(client, keyspace) for client in (one, other)]
        await stores[0].create("acme", "chat", model="demo", ttl_s=60, template_digest="")
        await asyncio.gather(*(gateway(stores[i % 2], history, random.Random(rng.random()), 25) for i in range(6)))
        check(history, await journal_of(stores[0]))
    assert history.accepted
    assert history.num_refused


async def test_lost_replies_break_no_fence_and_repeat_no_turn(server: EmbeddedServer) -> None:
    rng, history = random.Random(7), History()
    async with LossyProxy(server.url) as proxy, connected(proxy.url) as lossy, connected(server.url) as direct:
        keyspace = fresh_keyspace()
        store = RedisSessionStore(lossy, keyspace)
        await store.create("acme", "chat", model="demo", ttl_s=60, template_digest="")
        running = asyncio.gather(*(gateway(store, history, random.Random(rng.random()), 12) for _ in range(4)))
        while not running.done():
            proxy.lose_next_reply()
            await asyncio.sleep(0.04)
        await running
        check(history, await journal_of(RedisSessionStore(direct, keyspace)))
    assert history.accepted


async def test_server_killed_under_load_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    history = History()
    server = EmbeddedServer(tmp_path)
    url = server.start()
    assert server.pid is not None
    try:
        async with connected(url) as client:
            keyspace = fresh_keyspace()
            store = RedisSessionStore(client, keyspace)
            await store.create("acme", "chat", model="demo", ttl_s=60, template_digest="")
            running = asyncio.gather(*(gateway(store, history, random.Random(i), 40) for i in range(3)))
            await asyncio.sleep(0.1)
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.sleep(0.1)
            server.stop()
            assert server.start() == url
            await running
            check(history, await journal_of(store))
    finally:
        server.stop()
    assert history.accepted


NAMES = st.sampled_from(["a", "b"])
TENANTS = st.sampled_from(["acme", "other"])
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=5).map(tuple)
TURNS = st.builds(TurnRecord, TOKENS, TOKENS, st.sampled_from(FinishReason), st.sampled_from(["", "t"]))
HOLDERS = st.lists(
    st.builds(
        Holder,
        replica_id=st.sampled_from(["d0", "d1"]),
        incarnation=st.sampled_from(["x", "y"]),
        num_computed_tokens=st.integers(0, 99),
        tier=st.sampled_from(Tier),
        num_bytes=st.integers(0, 900),
    ),
    max_size=3,
    unique_by=lambda holder: (holder.replica_id, holder.incarnation),
)
KEYS = st.sampled_from([None, "k0", "k1"])
QUOTA_BYTES = 4000
ENDED_S, LONG_S = 0.001, 60.0


class BothStores(RuleBasedStateMachine):
    """Does the same to a memory store and to Redis, and compares all that comes of it but the times."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.client = connect(RedisSettings(url=url))
        self.keyspace = fresh_keyspace()
        memory, redis = MemorySessionStore(QUOTA_BYTES), RedisSessionStore(self.client, self.keyspace, QUOTA_BYTES)
        self.stores: tuple[SessionStore, SessionStore] = (memory, redis)
        self.leases: list[tuple[Lease, Lease]] = []

    def teardown(self) -> None:
        self.runner.run(self.client.aclose())
        self.runner.close()

    def both(self, operation: Callable[[SessionStore, int], Coroutine[Any, Any, Any]]) -> tuple[Any, Any] | None:
        """The results in memory and in Redis, after they were found to agree; None if both raised the same."""
        results = [self.runner.run(self.outcome(operation(store, i))) for i, store in enumerate(self.stores)]
        assert timeless(results[0]) == timeless(results[1])
        return None if isinstance(results[0], AntiphonError) else (results[0], results[1])

    async def outcome(self, operation: Coroutine[Any, Any, Any]) -> Any:
        try:
            return await operation
        except AntiphonError as error:
            return error

    @rule(tenant=TENANTS, name=NAMES)
    def create(self, tenant: str, name: str) -> None:
        self.both(lambda store, _: store.create(tenant, name, model="m", ttl_s=LONG_S, template_digest="t"))

    @rule(tenant=TENANTS, name=NAMES)
    def delete(self, tenant: str, name: str) -> None:
        self.both(lambda store, _: store.delete(tenant, name))

    @rule(tenant=TENANTS, page_size=st.integers(1, 3))
    def list_sessions(self, tenant: str, page_size: int) -> None:
        self.both(lambda store, _: store.list(tenant, page_size))

    @rule(
        tenant=TENANTS,
        name=NAMES,
        key=KEYS,
        needed_bytes=st.integers(0, 3000),
        lease_ttl_s=st.sampled_from([ENDED_S, LONG_S]),
        data=st.data(),
    )
    def acquire(
        self, tenant: str, name: str, key: str | None, needed_bytes: int, lease_ttl_s: float, data: st.DataObject
    ) -> None:
        past = data.draw(st.sampled_from(self.leases)) if self.leases else None
        known = [None if past is None else lease.position_after_commit for lease in past or (None, None)]
        acquired = self.both(
            lambda store, i: store.acquire(tenant, name, TurnStart(key, needed_bytes, known[i]), lease_ttl_s)
        )
        time.sleep(0.003 if lease_ttl_s == ENDED_S else 0)
        if acquired is not None and isinstance(acquired[0], Acquired):
            self.leases.append((acquired[0].lease, acquired[1].lease))

    @precondition(lambda self: self.leases)
    @rule(turn=TURNS, holders=HOLDERS, data=st.data())
    def commit(self, turn: TurnRecord, holders: list[Holder], data: st.DataObject) -> None:
        leases = data.draw(st.sampled_from(self.leases))
        self.both(lambda store, i: store.commit(leases[i], turn, holders))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        leases = data.draw(st.sampled_from(self.leases))
        self.both(lambda store, i: store.renew(leases[i], LONG_S))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        leases = data.draw(st.sampled_from(self.leases))
        self.both(lambda store, i: store.release(leases[i]))

    @rule(tenant=TENANTS, name=NAMES, replica=st.sampled_from(["d0", "d1"]))
    def remove_holder(self, tenant: str, name: str, replica: str) -> None:
        self.both(lambda store, _: store.remove_holder(tenant, name, replica, "x"))

    @invariant()
    def sessions_agree_and_bytes_add_up(self) -> None:
        for tenant in ("acme", "other"):
            page = self.both(lambda store, _, tenant=tenant: store.list(tenant, 10))
            assert page is not None
            charged = self.runner.run(self.client.hgetall(self.keyspace.tenant(tenant).bytes))
            total = int(charged.pop(b"total", 0))
            assert total == sum(map(int, charged.values())) == sum(one.num_bytes for one in page[1].sessions)


def timeless(result: Any) -> Any:
    """What of a result has to be the same in both stores: all but times, fences and random marks."""
    match result:
        case AntiphonError():
            return type(result), str(result)
        case SessionRecord():
            return replace(result, created_at_s=0, updated_at_s=0, expires_at_s=0)
        case RecordPage():
            return [timeless(session) for session in result.sessions], bool(result.next_page_token)
        case Acquired():
            return result.lease.turn, timeless(result.session), result.turns, result.num_known_turns
        case AlreadyCommitted():
            return result.turn, result.record, timeless(result.session)
        case Lease():
            return result.turn
    return result


def test_redis_does_what_memory_does_whatever_the_order(server: EmbeddedServer) -> None:
    run_state_machine_as_test(
        lambda: BothStores(server.url),
        settings=settings(max_examples=25, stateful_step_count=30, deadline=None, derandomize=True),
    )
