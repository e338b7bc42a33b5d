"""A replica's reports: those of an engine that computes go on, those of one that hangs end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from services.common.errors import Unavailable
from services.common.telemetry import Metrics
from services.engine.loop import EngineLoop
from services.replica.heartbeat import Heartbeat
from services.sessions.embedded import EmbeddedServer
from services.sessions.registry import ReplicaRecord, ReplicaRegistry, Role
from tests.redis_servers import connected, fresh_keyspace, running_server
from tests.unit.replica_group import tiny_engine

INTERVAL_S, TTL_S = 0.05, 0.4
RECORD = ReplicaRecord(Role.DECODE, "decode-0", "boot-1", 0.0, "model", "layout", 16, 64, 64)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with running_server("embedded") as started:
        yield started


@pytest.fixture
async def loop() -> AsyncIterator[EngineLoop]:
    loop = EngineLoop(tiny_engine())
    loop.start()
    yield loop
    await loop.stop()


@pytest.fixture
async def registry(server: EmbeddedServer) -> AsyncIterator[ReplicaRegistry]:
    async with connected(server.url) as client:
        yield ReplicaRegistry(client, fresh_keyspace())


def beating(loop: EngineLoop, registry: ReplicaRegistry, max_step_s: float) -> Heartbeat:
    return Heartbeat(
        registry, RECORD, loop, Metrics("decode", "tiny"), interval_s=INTERVAL_S, ttl_s=TTL_S, max_step_s=max_step_s
    )


async def test_a_replica_whose_engine_hangs_is_registered_no_more(loop: EngineLoop, registry: ReplicaRegistry) -> None:
    heartbeat, may_go_on = beating(loop, registry, max_step_s=0.3), threading.Event()
    await heartbeat.start()
    hanging = asyncio.create_task(loop.call(lambda engine: may_go_on.wait()))
    try:
        async with asyncio.timeout(10):
            while await registry.list(Role.DECODE):
                await asyncio.sleep(INTERVAL_S)
        assert isinstance(heartbeat.failure, Unavailable)
    finally:
        may_go_on.set()
    await hanging
    await heartbeat.stop()


async def test_a_long_step_is_no_reason_to_fall_silent(loop: EngineLoop, registry: ReplicaRegistry) -> None:
    heartbeat, may_go_on = beating(loop, registry, max_step_s=60.0), threading.Event()
    await heartbeat.start()
    computing = asyncio.create_task(loop.call(lambda engine: may_go_on.wait()))
    await asyncio.sleep(3 * TTL_S)
    assert len(await registry.list(Role.DECODE)) == 1
    may_go_on.set()
    await computing
    await heartbeat.stop()
    assert heartbeat.failure is None
    assert not await registry.list(Role.DECODE)
