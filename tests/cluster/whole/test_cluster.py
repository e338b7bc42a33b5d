"""The whole cluster: affinity that is real, and faults that cost no token."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

# isort: split
from tests.cluster.serving import (
    GREEDY,
    HEARTBEAT_S,
    Serving,
    client_of,
    collect,
    local_conversation,
    oracle,
    prefill_processes,
    process_at,
    serving,
)

# isort: split
from services.client import AsyncClient, AsyncSession
from services.common.errors import DeadlineExceeded
from services.common.messages import Delta, KvSource, RoutingReason, SamplingParams
from services.gateway.decode_client import DecodeClient
from services.local import LocalPipeline, LocalRequest
from services.pb.antiphon.internal.v1 import decode_service_pb2 as pb
from services.sessions.registry import ReplicaRecord, Role
from services.wire import values

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]

LONG = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)


@pytest.fixture(scope="module")
def local() -> LocalPipeline:
    return oracle()


@pytest.fixture(scope="module")
def two_by_two(ray_cluster: None) -> Iterator[Serving]:
    with serving(2, 2) as started:
        yield started


@pytest.fixture
async def cluster(two_by_two: Serving) -> AsyncIterator[tuple[Serving, AsyncClient]]:
    await two_by_two.is_whole()
    async with client_of(two_by_two) as client:
        yield two_by_two, client


async def test_later_turn_lands_on_the_holder_with_all_full_blocks_cached(
    cluster: tuple[Serving, AsyncClient],
) -> None:
    _, client = cluster
    session = await client.create_session()
    first = await collect(session.chat("Tell me a story about a whale.", sampling=LONG))
    explained = await session.explain("Who helped?")
    second = await collect(session.chat("Who helped?", sampling=GREEDY))
    assert second.started.routing.reason is RoutingReason.HELD_PREFIX
    assert second.finished.replica == first.finished.replica == explained.routing.replica
    num_computed = first.finished.usage.num_prompt_tokens + len(first.token_ids) - 1
    assert second.finished.usage.num_cached_tokens == num_computed // 16 * 16
    assert second.finished.kv_origins[0].source is KvSource.LOCAL
    assert explained.num_prompt_tokens == second.started.num_prompt_tokens


async def test_busy_holder_is_left_and_its_blocks_are_fetched(
    cluster: tuple[Serving, AsyncClient], local: LocalPipeline
) -> None:
    started, client = cluster
    lines = ["Tell me a story about a ferry.", "Who helped?"]
    expected = local_conversation(local, lines, LONG)
    session = await client.create_session()
    first = await collect(session.chat(lines[0], sampling=LONG))
    holder = next(each for each in await started.replicas() if each.replica_id == first.finished.replica)
    async with busy(started, holder):
        explained = await session.explain(lines[1])
        second = await collect(session.chat(lines[1], sampling=LONG))
    assert second.started.routing.reason is RoutingReason.HOLDER_OVERLOADED
    assert second.finished.replica == explained.routing.replica != holder.replica_id
    fetched = sum(each.num_tokens for each in second.finished.kv_origins if each.source is KvSource.FETCHED)
    assert fetched > 0
    assert second.finished.timings.transfer_bytes > 0
    assert [first.token_ids, second.token_ids] == [turn.token_ids for turn in expected]


@contextlib.asynccontextmanager
async def busy(started: Serving, holder: ReplicaRecord) -> AsyncIterator[None]:
    """Many sequences run at one replica, and the registry shows it."""
    decode = DecodeClient()
    sampling = values.sampling_to_proto(SamplingParams(temperature=0.0, max_tokens=280, ignore_eos=True))

    async def load(number: int) -> None:
        request = pb.GenerateRequest(
            request_id=f"load-{number}",
            incarnation=holder.incarnation,
            salt=bytes(16),
            token_ids=[number + 100, 200, 300],
            sampling=sampling,
        )
        async for _ in decode.generate(holder.address, request, None, None):
            pass

    tasks = [asyncio.create_task(load(number)) for number in range(24)]
    try:
        await started.wait_for(
            lambda records: any(each.replica_id == holder.replica_id and each.num_running >= 20 for each in records)
        )
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await decode.close()


async def test_client_that_leaves_and_deadline_free_everything(cluster: tuple[Serving, AsyncClient]) -> None:
    started, client = cluster
    session = await client.create_session()
    events = session.chat("Tell me a story about a well.", sampling=LONG)
    async for event in events:
        if isinstance(event, Delta):
            break
    await events.aclose()
    with pytest.raises(DeadlineExceeded):
        await collect(session.chat("Tell me more.", sampling=LONG, timeout_s=0.4))
    await is_free(session)
    await started.wait_for(
        lambda records: all(not each.num_running and each.num_free_blocks == each.num_blocks for each in records),
        1.0 + 2 * HEARTBEAT_S,
    )
    assert (await session.info()).num_turns == 0


async def is_free(session: AsyncSession) -> None:
    async with asyncio.timeout(1.0):
        while (await session.info()).active_turn is not None:
            await asyncio.sleep(0.02)


async def test_decode_replica_killed_in_mid_stream_costs_no_token(
    cluster: tuple[Serving, AsyncClient], local: LocalPipeline
) -> None:
    started, client = cluster
    lines = ["Tell me a story about a bell.", "Who helped?"]
    expected = local_conversation(local, lines, LONG)
    session = await client.create_session()
    first = await collect(session.chat(lines[0], sampling=LONG))
    events = session.chat(lines[1], sampling=LONG)
    seen: list[Any] = []
    async for event in events:
        seen.append(event)
        if len(seen) == 20:
            break
    address = next(each.address for each in await started.replicas() if each.replica_id == seen[0].routing.replica)
    process_at(address).kill()
    second = await collect(chained(seen, events))
    assert second.finished.num_resumes == 1
    assert second.finished.replica != seen[0].routing.replica
    assert [first.token_ids, second.token_ids] == [turn.token_ids for turn in expected]
    info = await session.info()
    assert info.num_turns == 2
    assert [each.replica for each in info.holders] == [second.finished.replica]


async def test_prefill_replica_killed_in_mid_call_costs_no_token(
    cluster: tuple[Serving, AsyncClient], local: LocalPipeline
) -> None:
    started, client = cluster
    token_ids = [(i * 31) % 8000 + 100 for i in range(1400)]
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    expected = await asyncio.to_thread(local_tokens, local, token_ids, sampling)
    turn = asyncio.create_task(collect(client.generate(token_ids, sampling=sampling)))
    victims = prefill_processes()
    await asyncio.sleep(0.3)
    victims[0].kill()
    assert (await turn).token_ids == expected
    await started.is_whole()


def local_tokens(local: LocalPipeline, token_ids: list[int], sampling: SamplingParams) -> tuple[int, ...]:
    events = [event for _, event in local.run([LocalRequest(token_ids, sampling)])]
    return tuple(token_id for event in events if isinstance(event, Delta) for token_id in event.token_ids)


async def chained(seen: list[Any], rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    for event in seen:
        yield event
    async for event in rest:
        yield event


async def test_replicas_that_were_lost_come_again(cluster: tuple[Serving, AsyncClient]) -> None:
    started, client = cluster
    assert len(await started.replicas(Role.DECODE)) == 2
    assert (await client.model()).name == "demo"
    assert await client.is_serving("antiphon.v1.ChatService")
