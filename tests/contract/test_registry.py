"""The replica registry, on the embedded Valkey and on Debian's Redis where it is installed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from services.common.errors import StaleLease, Unavailable
from services.sessions.embedded import EmbeddedServer
from services.sessions.keys import Keyspace
from services.sessions.registry import ReplicaRecord, ReplicaRegistry, Role
from tests.redis_servers import KINDS, connected, fresh_keyspace, running_server

TINY_S = 0.03
DECODE = ReplicaRecord(
    role=Role.DECODE,
    replica_id="decode-0",
    incarnation="boot-1",
    started_at_s=1000.25,
    model_fingerprint="model",
    layout_fingerprint="layout",
    block_size=16,
    num_blocks=100,
    num_free_blocks=40,
    address="127.0.0.1:9001",
    serve_replica_id="abc",
    num_running=3,
    num_waiting_tokens=17,
    decode_tokens_per_s=12.5,
)
PREFILL = replace(DECODE, role=Role.PREFILL, address="", prefill_tokens_per_s=900.0, transfer_bytes_per_s=1e9)


@pytest.fixture(scope="module", params=KINDS)
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
def registry(client: Redis, keyspace: Keyspace) -> ReplicaRegistry:
    return ReplicaRegistry(client, keyspace)


async def test_registered_replicas_are_listed_as_they_are(registry: ReplicaRegistry) -> None:
    assert await registry.list() == ()
    await registry.heartbeat(PREFILL, 10)
    await registry.heartbeat(DECODE, 10)
    assert await registry.list() == (DECODE, PREFILL)
    assert await registry.list(Role.DECODE) == (DECODE,)
    assert await registry.list(Role.PREFILL) == (PREFILL,)


async def test_heartbeat_replaces_what_was_said_before(registry: ReplicaRegistry) -> None:
    await registry.heartbeat(DECODE, 10)
    draining = replace(DECODE, num_free_blocks=0, is_draining=True)
    await registry.heartbeat(draining, 10)
    assert await registry.list() == (draining,)


async def test_silent_replica_is_gone_and_the_others_stay(registry: ReplicaRegistry) -> None:
    other = replace(DECODE, replica_id="decode-1")
    await registry.heartbeat(other, 10)
    await registry.heartbeat(DECODE, TINY_S)
    await asyncio.sleep(2 * TINY_S)
    assert await registry.list() == (other,)


async def test_heartbeat_of_one_sweeps_what_is_left_of_the_dead(
    registry: ReplicaRegistry, client: Redis, keyspace: Keyspace
) -> None:
    await registry.heartbeat(DECODE, TINY_S)
    await asyncio.sleep(2 * TINY_S)
    await registry.heartbeat(PREFILL, 0.5)
    assert await client.hlen(keyspace.replicas) == 1
    await asyncio.sleep(0.6)
    assert await client.exists(keyspace.replicas) == 0


async def test_short_heartbeat_does_not_end_others_early(registry: ReplicaRegistry) -> None:
    await registry.heartbeat(DECODE, 10)
    await registry.heartbeat(PREFILL, TINY_S)
    await asyncio.sleep(2 * TINY_S)
    assert await registry.list() == (DECODE,)


async def test_deregistered_replica_is_gone_at_once(registry: ReplicaRegistry) -> None:
    await registry.heartbeat(DECODE, 10)
    await registry.deregister(Role.PREFILL, "decode-0", "boot-1")
    assert await registry.list() == (DECODE,)
    for _ in range(2):
        await registry.deregister(Role.DECODE, "decode-0", "boot-1")
        assert await registry.list() == ()


async def test_younger_incarnation_replaces_an_older_one_and_not_the_reverse(registry: ReplicaRegistry) -> None:
    younger = replace(DECODE, incarnation="boot-2", started_at_s=1000.5)
    await registry.heartbeat(DECODE, 10)
    await registry.heartbeat(younger, 10)
    with pytest.raises(StaleLease):
        await registry.heartbeat(DECODE, 10)
    await registry.deregister(Role.DECODE, "decode-0", "boot-1")
    assert await registry.list() == (younger,)


async def test_clusters_do_not_see_each_other(registry: ReplicaRegistry, client: Redis) -> None:
    await registry.heartbeat(DECODE, 10)
    assert await ReplicaRegistry(client, fresh_keyspace()).list() == ()


async def test_record_of_a_newer_release_is_left_out(
    registry: ReplicaRegistry, client: Redis, keyspace: Keyspace
) -> None:
    await registry.heartbeat(DECODE, 10)
    value = (await client.hvals(keyspace.replicas))[0]
    newer = value.replace(b'"v":1', b'"v":2').replace(b'"block_size"', b'"page_size"')
    await client.hset(keyspace.replicas, "decode:decode-9", newer)
    assert await registry.list() == (DECODE,)


async def test_a_field_that_only_a_newer_release_knows_is_passed_over(
    registry: ReplicaRegistry, client: Redis, keyspace: Keyspace
) -> None:
    await registry.heartbeat(DECODE, 10)
    value = (await client.hvals(keyspace.replicas))[0]
    await client.hset(
        keyspace.replicas, "decode:decode-0", value.replace(b'"num_running"', b'"num_new":1,"num_running"')
    )
    assert await registry.list() == (DECODE,)


@pytest.mark.parametrize("incarnation", ["", "two words", "line\n"])
def test_incarnation_is_one_word(incarnation: str) -> None:
    with pytest.raises(AssertionError):
        replace(DECODE, incarnation=incarnation)


async def test_unreachable_server_is_unavailable() -> None:
    with running_server("embedded") as server:
        url = server.url
    async with connected(url) as client:
        with pytest.raises(Unavailable):
            await ReplicaRegistry(client, fresh_keyspace()).list()
