"""The gateway's turn with scripted replicas: sessions, routing, resuming, stop strings, cancelling, replaying."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest

from services.common.errors import Exhausted, InvalidRequest, NotFound, SessionBusy, Unavailable
from services.common.messages import Delta, Finished, Message, RoutingReason, Started, TurnEvent, TurnRequest
from services.common.sampling import FinishReason, SamplingParams
from services.common.telemetry import JsonFormatter
from services.sessions.embedded import EmbeddedServer
from services.sessions.registry import Role
from tests.contract.scripted_decode import Cluster, scripted_cluster
from tests.redis_servers import running_server

REPLY = "The fox took the lantern home, and all the forest was bright. It was a good day."
QUICK_S = 1.0


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with running_server("embedded") as started:
        yield started


@pytest.fixture
async def cluster(server: EmbeddedServer) -> AsyncIterator[Cluster]:
    async with scripted_cluster(server.url, REPLY) as cluster:
        yield cluster


def turn(text: str = "Tell me a story.", session: str | None = "s", **sampling: Any) -> TurnRequest:
    return TurnRequest("acme", "r1", session, (Message("user", text),), sampling=SamplingParams(**sampling))


async def run(cluster: Cluster, request: TurnRequest) -> list[TurnEvent]:
    return [event async for event in cluster.pipeline.generate(request)]


def parts_of(events: Sequence[TurnEvent]) -> tuple[Started, str, list[int], Finished]:
    """Checks the order of events and that indices have neither gap nor repeat."""
    started, *deltas, finished = events
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    token_ids: list[int] = []
    text = ""
    for delta in deltas:
        assert isinstance(delta, Delta)
        assert delta.index == len(token_ids)
        token_ids += delta.token_ids
        text += delta.text
    return started, text, token_ids, finished


async def make_session(cluster: Cluster, session: str = "s") -> None:
    await cluster.parts.sessions.create("acme", session, None)


async def is_free(cluster: Cluster) -> bool:
    return (await cluster.parts.store.get("acme", "s")).running_turn is None


async def soon(condition: Any) -> None:
    """The condition (a coroutine function, or a plain one) holds within a second."""
    deadline_s = time.monotonic() + QUICK_S
    while True:
        result = condition()
        if await result if asyncio.iscoroutine(result) else result:
            return
        assert time.monotonic() < deadline_s, "not within a second"
        await asyncio.sleep(0.02)


async def test_turn_streams_the_reply_and_commits_it(cluster: Cluster) -> None:
    await make_session(cluster)
    started, text, token_ids, finished = parts_of(await run(cluster, turn()))
    assert text == REPLY
    assert (started.turn, started.routing.reason) == (1, RoutingReason.NO_HOLDER)
    assert finished.usage.num_generated_tokens == len(token_ids)
    assert finished.timings.total_ms >= finished.timings.first_token_ms > 0
    info = await cluster.parts.sessions.get("acme", "s")
    assert (info.num_turns, info.num_generated_tokens, info.active_turn) == (1, len(token_ids), None)
    assert [each.replica for each in info.holders] == [finished.replica]
    assert info.holders[0].num_computed_tokens == started.num_prompt_tokens + len(token_ids) - 1


async def test_later_turn_sends_history_as_it_was_sampled_and_goes_to_its_holder(cluster: Cluster) -> None:
    await make_session(cluster)
    first, _, reply_ids, finished = parts_of(await run(cluster, turn()))
    await cluster.register(finished.replica, num_waiting_tokens=1)  # a little dearer, were it not for the history
    second, _, _, after = parts_of(await run(cluster, turn("And then?")))
    holder = cluster.replicas[finished.replica]
    old, new = holder.requests
    assert (after.replica, second.routing.reason) == (finished.replica, RoutingReason.HELD_PREFIX)
    assert list(new.token_ids)[: len(old.token_ids) + len(reply_ids)] == [*old.token_ids, *reply_ids]
    assert new.num_history_tokens == first.num_prompt_tokens + len(reply_ids)
    assert (new.turn, new.session_digest, new.salt) == (2, old.session_digest, old.salt)
    assert new.fence > old.fence > 0
    assert second.num_cached_tokens >= new.num_history_tokens - 1


async def test_busy_holder_is_left_and_named_for_the_fetch(cluster: Cluster) -> None:
    await make_session(cluster)
    _, _, _, before = parts_of(await run(cluster, turn()))
    await cluster.register(before.replica, num_waiting_tokens=1_000_000)
    explained = await cluster.pipeline.explain(turn("And then?"))
    started, text, _, after = parts_of(await run(cluster, turn("And then?")))
    assert after.replica != before.replica
    assert started.routing.reason is RoutingReason.HOLDER_OVERLOADED
    assert (explained.routing, explained.num_prompt_tokens) == (started.routing, started.num_prompt_tokens)
    request = cluster.replicas[after.replica].requests[-1]
    assert [each.replica for each in request.holders] == [before.replica]
    assert request.holders[0].address == cluster.replicas[before.replica].record.address  # type: ignore[union-attr]
    assert text == REPLY
    holders = (await cluster.parts.sessions.get("acme", "s")).holders
    assert {each.replica for each in holders} == {after.replica, before.replica}


async def test_log_lines_of_a_turn_say_whose_they_are_and_not_what_was_said(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    await make_session(cluster)
    cluster.replicas["a"].dies_at = 2
    with caplog.at_level("INFO", "services.gateway.pipeline"):
        await run(cluster, turn("A secret."))
    lost, ended = [each for each in caplog.records if each.name == "services.gateway.pipeline"]
    digest = cluster.parts.keyspace.session_digest("acme", "s")
    for line, replica in ((lost, "a"), (ended, "b")):
        fields = vars(line)
        assert [fields[name] for name in ("request_id", "session", "turn", "replica")] == ["r1", digest, 1, replica]
        assert "secret" not in JsonFormatter().format(line)


@pytest.mark.parametrize("dies_at", [0, 1, 7])
async def test_lost_replica_is_replaced_without_gap_or_repeat(cluster: Cluster, dies_at: int) -> None:
    await make_session(cluster)
    cluster.replicas["a"].dies_at = dies_at
    started, text, token_ids, finished = parts_of(await run(cluster, turn(temperature=1.0)))
    assert text == REPLY
    assert (started.routing.replica, finished.replica, finished.num_resumes) == ("a", "b", 1)
    (lost,), (resumed,) = cluster.replicas["a"].requests, cluster.replicas["b"].requests
    assert resumed.num_resumed_tokens == dies_at
    assert list(resumed.token_ids) == [*lost.token_ids, *token_ids[:dies_at]]
    assert resumed.sampling.seed == lost.sampling.seed
    assert lost.sampling.HasField("seed")
    assert [each.replica for each in (await cluster.parts.sessions.get("acme", "s")).holders] == ["b"]
    registry = cluster.parts.metrics.registry
    labels = {"model_name": "demo", "role": "gateway", "from": "decode", "outcome": "resumed"}
    assert registry.get_sample_value("antiphon_migrations_total", labels) == 1.0


async def test_later_turns_count_as_hits_if_they_found_their_history_where_they_went(cluster: Cluster) -> None:
    await make_session(cluster)
    _, _, _, first = parts_of(await run(cluster, turn()))
    holder = cluster.replicas[first.replica]
    for holder.has_nothing in (False, True, False):
        started, *_ = parts_of(await run(cluster, turn("And then?")))
        assert (started.routing.replica, started.routing.reason) == (holder.name, RoutingReason.HELD_PREFIX)
    counted = {
        name: cluster.parts.metrics.registry.get_sample_value(
            f"antiphon_affinity_{name}_total", {"model_name": "demo", "role": "gateway"}
        )
        for name in ("hits", "misses")
    }
    assert counted == {"hits": 2.0, "misses": 1.0}


async def test_turn_lost_too_often_is_unavailable_and_leaves_nothing(server: EmbeddedServer) -> None:
    async with scripted_cluster(server.url, REPLY, "abcd", routing={"max_resumes": 2}) as cluster:
        await make_session(cluster)
        for replica in cluster.replicas.values():
            replica.dies_at = 3
            replica.reply = cluster.replicas["a"].reply
        with pytest.raises(Unavailable):
            await run(cluster, turn())
        assert sum(len(replica.requests) for replica in cluster.replicas.values()) <= 3
        assert await is_free(cluster)
        assert (await cluster.parts.sessions.get("acme", "s")).num_turns == 0


async def test_replica_lost_after_the_last_token_is_not_replaced(cluster: Cluster) -> None:
    await make_session(cluster)
    cluster.replicas["a"].dies_at = 5
    _, _, token_ids, finished = parts_of(await run(cluster, turn(max_tokens=5)))
    assert (len(token_ids), finished.reason, finished.num_resumes) == (5, FinishReason.LENGTH, 0)
    assert cluster.replicas["b"].requests == []
    assert (await cluster.parts.sessions.get("acme", "s")).holders == ()


async def test_full_replica_is_passed_over_and_all_full_is_exhausted(cluster: Cluster) -> None:
    cluster.replicas["a"].is_full = True
    started, _, _, finished = parts_of(await run(cluster, turn(session=None)))
    assert (started.routing.replica, finished.replica, finished.num_resumes) == ("b", "b", 0)
    cluster.replicas["b"].is_full = True
    with pytest.raises(Exhausted):
        await run(cluster, turn(session=None))


async def test_stop_string_ends_the_sequence_and_is_not_in_the_text(cluster: Cluster) -> None:
    await make_session(cluster)
    for replica in cluster.replicas.values():
        replica.hangs_at = len(replica.reply) - 2
    _, text, token_ids, finished = parts_of(await run(cluster, turn(stop=(" and all",))))
    assert text == "The fox took the lantern home,"
    assert finished.reason is FinishReason.STOP
    replica = cluster.replicas[finished.replica]
    await soon(lambda: replica.num_open == 0)
    info = await cluster.parts.sessions.get("acme", "s")
    assert info.num_generated_tokens == len(token_ids) == finished.usage.num_generated_tokens
    assert info.holders[0].num_computed_tokens == finished.usage.num_prompt_tokens + len(token_ids) - 1
    assert not replica.requests[0].sampling.stop
    # The replica's own account is there as of any other turn.
    assert finished.timings.prefill_ms == 3.0
    assert [(each.replica, each.num_tokens) for each in finished.kv_origins] == [
        (finished.replica, finished.usage.num_prompt_tokens)
    ]


async def test_stop_string_ends_the_turn_also_if_the_replica_does_not_hear_of_it(cluster: Cluster) -> None:
    for replica in cluster.replicas.values():
        replica.hangs_at = len(replica.reply) - 2
        replica.ignores_stop = True
    _, text, _, finished = parts_of(await run(cluster, turn(session=None, stop=(" and all",))))
    assert (text, finished.reason) == ("The fox took the lantern home,", FinishReason.STOP)
    assert finished.num_resumes == 0
    await soon(lambda: cluster.replicas[finished.replica].num_open == 0)


async def test_a_replica_that_hangs_and_is_registered_no_more_costs_no_token(server: EmbeddedServer) -> None:
    short = {"registry_ttl_s": 0.4, "heartbeat_s": 0.2}
    async with scripted_cluster(server.url, REPLY, sessions=short) as cluster:
        hanging = cluster.replicas["a"]
        hanging.hangs_at = 4
        await cluster.register("b", num_waiting_tokens=10_000)
        asked = asyncio.create_task(run(cluster, turn(session=None)))
        await soon(lambda: hanging.num_open == 1)
        await asyncio.sleep(0.6)  # as long as it is registered it is waited for
        assert hanging.num_open == 1
        await cluster.registry.deregister(Role.DECODE, "a", "a-1")
        started, text, _, finished = parts_of(await asked)
        assert (started.routing.replica, finished.replica, finished.num_resumes, text) == ("a", "b", 1, REPLY)
        assert cluster.replicas["b"].requests[0].num_resumed_tokens == 4
        await soon(lambda: hanging.num_open == 0)


async def test_a_turn_that_waits_for_a_hanging_replica_can_be_cancelled(server: EmbeddedServer) -> None:
    async with scripted_cluster(server.url, REPLY, sessions={"registry_ttl_s": 0.4, "heartbeat_s": 0.2}) as cluster:
        for replica in cluster.replicas.values():
            replica.hangs_at = 1
        asked = asyncio.create_task(run(cluster, turn(session=None)))
        await soon(lambda: sum(each.num_open for each in cluster.replicas.values()) == 1)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await soon(lambda: not any(each.num_open for each in cluster.replicas.values()))


async def test_a_turn_waits_for_a_replica_that_is_soon_back(cluster: Cluster) -> None:
    for name in "ab":
        await cluster.registry.deregister(Role.DECODE, name, f"{name}-1")
    asked = asyncio.create_task(run(cluster, turn(session=None)))
    await asyncio.sleep(0.5)
    assert not asked.done()
    await cluster.register("b")
    _, text, _, finished = parts_of(await asked)
    assert (text, finished.replica) == (REPLY, "b")


async def test_a_turn_that_no_replica_comes_for_is_unavailable(server: EmbeddedServer) -> None:
    async with scripted_cluster(server.url, REPLY, sessions={"registry_ttl_s": 0.4, "heartbeat_s": 0.2}) as cluster:
        await make_session(cluster)
        for name in "ab":
            await cluster.registry.deregister(Role.DECODE, name, f"{name}-1")
        with pytest.raises(Unavailable, match="no decode replica"):
            await run(cluster, turn())
        assert await is_free(cluster)


async def test_deleting_a_session_tells_who_holds_it(cluster: Cluster) -> None:
    await make_session(cluster)
    _, _, token_ids, finished = parts_of(await run(cluster, turn()))
    await cluster.parts.sessions.delete("acme", "s")
    told = {name: replica.forgotten for name, replica in cluster.replicas.items() if replica.forgotten}
    assert list(told) == [finished.replica]
    (request,) = told[finished.replica]
    assert len(request.token_ids) == finished.usage.num_prompt_tokens + len(token_ids)
    generated = cluster.replicas[finished.replica].requests[0]
    assert (request.salt, request.session_digest) == (generated.salt, generated.session_digest)
    with pytest.raises(NotFound):
        await cluster.parts.sessions.get("acme", "s")


async def test_deleting_a_session_does_not_need_its_holder(cluster: Cluster) -> None:
    await make_session(cluster)
    _, _, _, finished = parts_of(await run(cluster, turn()))
    await cluster.servers["ab".index(finished.replica)].stop(None)
    await cluster.parts.sessions.delete("acme", "s")
    with pytest.raises(NotFound):
        await cluster.parts.sessions.get("acme", "s")


async def test_a_turn_right_after_a_cancelled_one_waits_for_its_end(cluster: Cluster) -> None:
    await make_session(cluster)
    cluster.replicas["a"].hangs_at = cluster.replicas["b"].hangs_at = 2
    first = asyncio.create_task(run(cluster, turn()))
    await soon(lambda: cluster.replicas["a"].num_open + cluster.replicas["b"].num_open == 1)
    second = asyncio.create_task(run(cluster, turn("And then?", max_tokens=2)))
    await asyncio.sleep(0.1)
    first.cancel()
    started, *_ = parts_of(await second)
    assert started.turn == 1


@pytest.mark.parametrize("num_events", [1, 4])
@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_client_that_leaves_frees_everything_at_once(
    cluster: Cluster, num_events: int, is_cancelled: bool
) -> None:
    await make_session(cluster)
    cluster.replicas["a"].hangs_at = num_events - 1
    events = cluster.pipeline.generate(turn())
    for _ in range(num_events):
        await anext(events)
    if is_cancelled:
        task = asyncio.create_task(anext(events))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        await events.aclose()
    await soon(lambda: cluster.replicas["a"].num_open == 0)
    await soon(lambda: is_free(cluster))
    assert cluster.parts.replicas.pending_tokens == {}
    assert (await cluster.parts.sessions.get("acme", "s")).num_turns == 0


async def test_cancelled_while_the_session_is_acquired_leaves_no_lease(cluster: Cluster) -> None:
    await make_session(cluster)
    for delay_s in (0.0, 0.0002, 0.0005, 0.001, 0.002):
        task = asyncio.create_task(run(cluster, turn()))
        await asyncio.sleep(delay_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await is_free(cluster)


@pytest.mark.parametrize("after_s", [0.0, 0.0002, 0.0005, 0.001])
@pytest.mark.parametrize("hangs_at", [None, 2])
async def test_cancelled_once_more_while_it_lets_go_leaves_no_lease(
    cluster: Cluster, hangs_at: int | None, after_s: float
) -> None:
    """A deadline does that: the edge's own timer cancels the turn, and then gRPC cancels the handler."""
    await make_session(cluster)
    for replica in cluster.replicas.values():
        replica.hangs_at = hangs_at
    for delay_s in (0.0, 0.0002, 0.0005, 0.001, 0.002, 0.05):
        task = asyncio.create_task(run(cluster, turn()))
        await asyncio.sleep(delay_s)
        task.cancel()
        await asyncio.sleep(after_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await is_free(cluster)


async def test_a_deletion_that_is_cancelled_leaves_no_lease(cluster: Cluster) -> None:
    await make_session(cluster)
    for delay_s in (0.0, 0.0002, 0.0005, 0.001, 0.0015, 0.002):
        task = asyncio.create_task(cluster.parts.sessions.delete("acme", "s"))
        await asyncio.sleep(delay_s)
        task.cancel()
        (end,) = await asyncio.gather(task, return_exceptions=True)
        if not isinstance(end, asyncio.CancelledError):
            return
        try:
            assert await is_free(cluster)
        except NotFound:  # it came too late
            return


async def test_second_turn_meanwhile_is_refused_by_name(cluster: Cluster) -> None:
    await make_session(cluster)
    cluster.replicas["a"].hangs_at = 2
    events = cluster.pipeline.generate(turn())
    await anext(events)
    with pytest.raises(SessionBusy) as refused:
        await run(cluster, turn("Me too."))
    assert (refused.value.session, refused.value.turn) == ("s", 1)
    with pytest.raises(SessionBusy):
        await cluster.parts.sessions.delete("acme", "s")
    await events.aclose()


async def test_repeated_idempotency_key_replays_the_reply_without_work(cluster: Cluster) -> None:
    await make_session(cluster)
    request = TurnRequest("acme", "r1", "s", (Message("user", "Hi"),), idempotency_key="k")
    started, text, token_ids, finished = parts_of(await run(cluster, request))
    num_requests = sum(len(replica.requests) for replica in cluster.replicas.values())
    again, same_text, same_ids, end = parts_of(await run(cluster, request))
    assert (same_text, same_ids, end.reason) == (text, token_ids, finished.reason)
    assert (again.turn, again.num_prompt_tokens) == (started.turn, started.num_prompt_tokens)
    assert sum(len(replica.requests) for replica in cluster.replicas.values()) == num_requests
    assert (await cluster.parts.sessions.get("acme", "s")).num_turns == 1


async def test_session_deleted_under_a_running_turn_ends_it_with_an_error(cluster: Cluster) -> None:
    await make_session(cluster)
    events = cluster.pipeline.generate(turn())
    await anext(events)
    await cluster.parts.store.delete("acme", "s")
    with pytest.raises(NotFound):
        async for _ in events:
            pass


async def test_raw_token_ids_skip_the_template(cluster: Cluster) -> None:
    parts_of(await run(cluster, TurnRequest("acme", "r", None, token_ids=(5, 6, 7))))
    (request,) = [each for replica in cluster.replicas.values() for each in replica.requests]
    assert list(request.token_ids) == [5, 6, 7]
    assert (request.fence, request.turn, request.session_digest) == (0, 0, "")


async def test_tenants_have_different_salts_and_sessions(cluster: Cluster) -> None:
    await make_session(cluster)
    for tenant in ("acme", "other"):
        await run(cluster, TurnRequest(tenant, "r", None, token_ids=(5, 6, 7)))
    salts = {each.salt for replica in cluster.replicas.values() for each in replica.requests}
    assert len(salts) == 2
    with pytest.raises(NotFound):
        await run(cluster, TurnRequest("other", "r", "s", token_ids=(5,)))


async def test_session_of_another_model_or_template_is_refused(cluster: Cluster) -> None:
    digest = cluster.parts.template_digest
    for session, model, template in (("m", "another", digest), ("t", "demo", "0" * 64)):
        await cluster.parts.store.create("acme", session, model=model, ttl_s=60, template_digest=template)
        with pytest.raises(InvalidRequest, match="session"):
            await run(cluster, turn(session=session))
        record = await cluster.parts.store.get("acme", session)
        assert record.running_turn is None


async def test_turns_without_a_session_go_on_while_the_store_is_away() -> None:
    with running_server("embedded") as server:
        async with scripted_cluster(server.url, REPLY) as cluster:
            await make_session(cluster)
            await run(cluster, turn(session=None))
            server.stop()
            _, text, _, _ = parts_of(await run(cluster, turn(session=None)))
            assert text == REPLY
            with pytest.raises(Unavailable):
                await run(cluster, turn())
            server.start()
            await run(cluster, turn())


async def test_store_that_restarts_under_a_turn_loses_nothing() -> None:
    with running_server("embedded") as server:
        async with scripted_cluster(server.url, REPLY) as cluster:
            await make_session(cluster)
            events = cluster.pipeline.generate(turn())
            await anext(events)
            server.stop()
            rest = asyncio.create_task(_collect(events))
            await asyncio.sleep(0.3)
            server.start()
            assert isinstance((await rest)[-1], Finished)
            assert (await cluster.parts.sessions.get("acme", "s")).num_turns == 1


async def _collect(events: AsyncIterator[TurnEvent]) -> list[TurnEvent]:
    return [event async for event in events]
