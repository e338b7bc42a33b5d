"""The whole cluster: affinity that is real, and faults that cost no token."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

# isort: split
from tests.cluster.serving import (
    GREEDY,
    Serving,
    collect,
    local_conversation,
    prefill_processes,
    process_at,
)

# isort: split
from services.client import AsyncClient
from services.common.messages import KvSource, RoutingReason
from services.common.sampling import SamplingParams
from services.local import LocalPipeline
from services.sessions.registry import Role
from tests.cluster.whole.loads import busy, chained, local_tokens

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]

LONG = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)


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


async def test_replicas_that_were_lost_come_again(cluster: tuple[Serving, AsyncClient]) -> None:
    started, client = cluster
    assert len(await started.replicas(Role.DECODE)) == 2
    assert (await client.model()).name == "demo"
    assert await client.is_serving("antiphon.v1.ChatService")
