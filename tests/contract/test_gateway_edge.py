"""The edge over a real socket: GatewayServer and both clients, in front of a small pipeline that echoes."""

import asyncio
import inspect
import json
import logging
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import generate_latest

from services.cli_options import SamplingOptions
from services.client import AsyncClient, AsyncSession, Client, Session
from services.common import errors
from services.common.messages import Delta, Explanation, Finished, Message, Started, TurnRequest, Usage
from services.common.sampling import SamplingParams
from services.common.telemetry import JsonFormatter, TraceContext
from services.gateway import convert
from services.gateway.status import status_of
from services.pb.antiphon.v1 import chat_service_pb2 as chat
from services.pb.antiphon.v1 import chat_service_pb2_grpc
from services.pb.antiphon.v1 import types_pb2 as types
from services.remote_chat import generate_remote
from tests.contract.echo_gateway import DEFAULT_SAMPLING, ROUTING, collect, connected, running, text_of

GENERATE = "/antiphon.v1.ChatService/Generate"
SERVICES = ("antiphon.v1.ChatService", "antiphon.v1.SessionService")


async def drain(call: Any) -> list[Any]:
    return [response async for response in call]


async def raw(target: str, path: str, body: bytes, **options: Any) -> grpc.aio.AioRpcError:
    """Sends bytes as they are to a streaming method; returns the error that comes back."""
    async with grpc.aio.insecure_channel(target) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await channel.unary_stream(path, bytes, bytes)(body, timeout=5, **options).read()
    return failed.value


async def test_a_turn_is_started_then_deltas_then_finished() -> None:
    async with connected() as (edge, client):
        events = await collect(client.generate("héllo", sampling=SamplingParams(temperature=0.0, seed=7)))
    assert isinstance(events[0], Started)
    assert events[0].routing == ROUTING
    assert text_of(events) == "héllo"
    assert [event.index for event in events if isinstance(event, Delta)] == [0, 1, 2, 3, 4]
    assert isinstance(events[-1], Finished)
    assert events[-1].usage == Usage(5, 0, 5)
    turn = edge.pipeline.turns[0]
    assert (turn.tenant, turn.session, turn.sampling) == ("default", None, SamplingParams(temperature=0.0, seed=7))


async def test_raw_token_ids_reach_the_pipeline() -> None:
    async with connected() as (edge, client):
        assert text_of(await collect(client.generate([104, 105]))) == "hi"
    assert edge.pipeline.turns[0].token_ids == (104, 105)


async def test_a_session_lives_through_its_turns() -> None:
    async with connected() as (edge, client):
        session = await client.create_session("talk", ttl_s=90.0)
        assert [event.turn for event in await collect(session.chat("a")) if isinstance(event, Started)] == [1]
        assert [event.turn for event in await collect(session.chat("b")) if isinstance(event, Started)] == [2]
        assert (await session.info()).num_turns == 2
        with pytest.raises(errors.AlreadyExists):
            await client.create_session("talk")
        assert (await client.open_session("talk")).id == "talk"
        await session.delete()
        with pytest.raises(errors.NotFound) as missing:
            await collect(session.chat("c"))
    assert (missing.value.resource_type, missing.value.name) == ("session", "talk")
    keys = {turn.idempotency_key for turn in edge.pipeline.turns}
    assert len(keys) == 3
    assert None not in keys


async def test_sessions_are_listed_page_by_page() -> None:
    async with connected() as (_, client):
        for name in "abc":
            await client.create_session(name)
        first = await client.list_sessions(page_size=2)
        second = await client.list_sessions(page_size=2, page_token=first.next_page_token)
    assert [info.session for info in first.sessions + second.sessions] == ["a", "b", "c"]
    assert second.next_page_token == ""


async def test_a_second_turn_on_a_busy_session_is_aborted_by_name() -> None:
    async with connected() as (edge, client):
        session = await client.create_session("talk")
        first = asyncio.create_task(collect(session.chat("wait")))
        await edge.pipeline.waits.wait()
        with pytest.raises(errors.SessionBusy) as busy:
            await collect(session.chat("x"))
        first.cancel()
    assert (busy.value.session, busy.value.turn) == ("talk", 1)


async def test_a_client_that_leaves_in_mid_stream_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async with connected() as (edge, client):
        for _ in range(20):
            edge.pipeline.ended.clear()
            async with aclosing(client.generate("flood")) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        break
            await asyncio.wait_for(edge.pipeline.ended.wait(), 5)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_turn_is_over_for_a_client_that_leaves_with_its_end() -> None:
    async with connected() as (_, client):
        async with aclosing(client.generate("x")) as events:
            async for event in events:
                if isinstance(event, Finished):
                    break
        assert not client._has_cancelled


async def test_text_model_and_explain_are_served() -> None:
    async with connected() as (_, client):
        assert await client.tokenize("ab") == (97, 98)
        assert await client.tokenize("ab", as_prompt=True) == (0, 97, 98)
        assert await client.tokenize([Message("user", "a")]) == (0, 97)
        assert await client.detokenize([97, 98]) == "ab"
        assert (await client.model()).name == "echo"
        assert (await client.explain("abc")) == Explanation(ROUTING, 3, 0)


async def test_what_a_turn_does_not_say_of_sampling_is_the_checkpoints_default() -> None:
    async with connected() as (edge, client):
        assert (await client.model()).default_sampling == DEFAULT_SAMPLING
        await collect(client.generate("x"))
        await collect(client.generate("x", sampling=SamplingParams()))
        stub = chat_service_pb2_grpc.ChatServiceStub(client._channel)
        body = convert.turn_to_proto(TurnRequest("", "", None, (Message("user", "x"),)))
        body.sampling.CopyFrom(types.SamplingParams(top_p=0.5))
        async for _ in stub.Generate(body):
            pass
    default, explicit, partial = (turn.sampling for turn in edge.pipeline.turns)
    assert default == DEFAULT_SAMPLING
    assert explicit == SamplingParams()
    assert partial == SamplingParams(temperature=0.6, top_p=0.5)


async def test_generate_at_a_cluster_is_what_it_is_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected() as (edge, _):
        turns = edge.pipeline.turns
        await asyncio.to_thread(generate_remote, edge.target, "ab", quiet=True)
        await asyncio.to_thread(generate_remote, edge.target, "ab", options=SamplingOptions(seed=3), quiet=True)
        await asyncio.to_thread(generate_remote, edge.target, "ab", session="talk", quiet=True)
    assert [turn.token_ids for turn in turns] == [(0, 97, 98), (0, 97, 98), ()]
    assert turns[2].messages == (Message("user", "ab"),)
    assert [turn.sampling for turn in turns[:2]] == [DEFAULT_SAMPLING, replace(DEFAULT_SAMPLING, seed=3)]


async def test_the_sync_client_does_the_same() -> None:
    def talk(target: str) -> tuple[str, int, bool]:
        with Client(target) as client:
            session = client.create_session("talk")
            text = text_of(list(session.chat("hello")))
            for _ in session.chat("flood"):
                break  # leaving the loop drops the generator, which cancels the turn
            with pytest.raises(errors.InvalidRequest):
                list(client.generate([]))
            return text, client.get_session("talk").num_turns, client.is_serving()

    async with running() as edge:
        assert await asyncio.to_thread(talk, edge.target) == ("hello", 1, True)


@pytest.mark.parametrize("pair", [(AsyncClient, Client), (AsyncSession, Session)])
def test_both_clients_offer_the_same(pair: tuple[type, type]) -> None:
    def offer(kind: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(each).parameters) for name, each in methods if not name.startswith("_")}

    assert offer(pair[0]) == offer(pair[1])


async def test_leaving_a_turn_cancels_it_in_the_pipeline() -> None:
    async with connected() as (edge, client):
        async with aclosing(client.generate("wait")) as events:
            await anext(events)
            await edge.pipeline.waits.wait()
        await asyncio.wait_for(edge.pipeline.ended.wait(), 5)
        assert edge.server is not None


async def test_a_broken_connection_cancels_the_turn() -> None:
    async with running() as edge:
        client = AsyncClient(edge.target)
        events = client.generate("wait")
        await anext(events)
        await client.close()
        await asyncio.wait_for(edge.pipeline.ended.wait(), 5)
        await events.aclose()


async def test_the_clients_deadline_ends_the_turn_everywhere() -> None:
    async with connected() as (edge, client):
        with pytest.raises(errors.DeadlineExceeded):
            await collect(client.generate("wait", timeout_s=0.3))
        await asyncio.wait_for(edge.pipeline.ended.wait(), 5)
        assert edge.pipeline.turns[0].deadline_s is not None


async def test_a_call_without_a_deadline_gets_the_default_one() -> None:
    async with connected(default_deadline_s=0.2) as (edge, client):
        with pytest.raises(errors.DeadlineExceeded, match="deadline passed"):
            await collect(client.generate("wait"))
        assert edge.pipeline.ended.is_set()


async def test_more_turns_than_allowed_are_refused_with_a_delay() -> None:
    async with connected(max_concurrent_turns=1) as (edge, client):
        first = asyncio.create_task(collect(client.generate("wait")))
        await edge.pipeline.waits.wait()
        with pytest.raises(errors.QueueFull) as full:
            await collect(client.generate("x"))
        assert full.value.retry_after_s > 0
        first.cancel()
        await edge.pipeline.ended.wait()


async def test_a_client_that_does_not_read_loses_its_turn_and_costs_no_memory() -> None:
    async with running(slow_client_timeout_s=0.3) as edge, grpc.aio.insecure_channel(edge.target) as channel:
        stub = chat_service_pb2_grpc.ChatServiceStub(channel)
        body = chat.GenerateRequest()
        body.chat.messages.add(role=2, content="flood")
        call = stub.Generate(body)
        await asyncio.wait_for(edge.pipeline.ended.wait(), 10)
        num_events = edge.pipeline.num_events
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await drain(call)
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert num_events * 2**16 < 32 * 2**20


async def test_an_unexpected_error_tells_the_client_only_an_id(caplog: pytest.LogCaptureFixture) -> None:
    async with connected() as (edge, client):
        with pytest.raises(errors.AntiphonError) as failed:
            await collect(client.generate("crash"))
        request_id = edge.pipeline.turns[0].request_id
    assert str(failed.value) == f"internal error (request {request_id})"
    record = next(record for record in caplog.records if record.levelno == logging.ERROR)
    line = json.loads(JsonFormatter().format(record))
    assert (line["request_id"], line["error"]) == (request_id, "ZeroDivisionError")
    assert "secret" not in json.dumps(line)


async def test_errors_carry_google_rpc_details() -> None:
    async with running() as edge:
        failed = await raw(edge.target, GENERATE, chat.GenerateRequest(session="sessions/a:b").SerializeToString())
    assert failed.code() is grpc.StatusCode.INVALID_ARGUMENT
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    details = status_of(failed).details
    assert any(detail.Unpack(info) for detail in details)
    assert any(detail.Unpack(bad) for detail in details)
    assert (info.domain, info.reason, bad.field_violations[0].field) == ("antiphon", "INVALID_REQUEST", "session")


@pytest.mark.parametrize("body", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x12\xff\x01"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(body: bytes) -> None:
    async with connected() as (edge, client):
        failed = await raw(edge.target, GENERATE, body)
        assert failed.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert text_of(await collect(client.generate("still here"))) == "still here"


async def test_an_unknown_method_is_unimplemented() -> None:
    async with running() as edge:
        failed = await raw(edge.target, "/antiphon.v1.ChatService/Sing", b"")
    assert failed.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_over_the_limit_is_refused_either_way() -> None:
    async with connected(max_request_bytes=2**20) as (_, client):
        with pytest.raises(errors.Exhausted):
            await client.tokenize("x" * 2**21)
        with pytest.raises(errors.Exhausted):
            await collect(client.generate("huge"))
        assert await client.tokenize("a") == (97,)


async def test_request_id_and_trace_are_carried_on() -> None:
    trace = TraceContext.new(is_sampled=True)
    async with running() as edge, grpc.aio.insecure_channel(edge.target) as channel:
        stub = chat_service_pb2_grpc.ChatServiceStub(channel)
        body = chat.GenerateRequest()
        body.chat.messages.add(role=2, content="x")
        call = stub.Generate(body, metadata=(("x-request-id", "mine-1"), ("traceparent", trace.header())))
        echoed = dict(await call.initial_metadata())
        started = (await drain(call))[0].started
        odd = stub.Generate(body, metadata=(("x-request-id", "not mine; nor yours"),))
        replaced = dict(await odd.initial_metadata())["x-request-id"]
        await drain(odd)
    assert echoed["x-request-id"] == started.request_id == "mine-1"
    carried = TraceContext.parse(edge.pipeline.turns[0].traceparent)
    assert carried is not None
    assert (carried.trace_id, carried.is_sampled) == (trace.trace_id, True)
    assert carried.span_id != trace.span_id
    assert len(replaced) == 32


async def test_unavailable_before_the_first_event_is_tried_again_under_a_key() -> None:
    async with connected() as (edge, client):
        session = await client.create_session()
        edge.pipeline.num_failures_left = 2
        assert text_of(await collect(session.chat("x"))) == "x"
        assert len({turn.idempotency_key for turn in edge.pipeline.turns}) == 1
        assert len(edge.pipeline.turns) == 3


async def test_unavailable_is_not_tried_again_without_a_key_or_after_the_first_event() -> None:
    async with connected() as (edge, client):
        edge.pipeline.num_failures_left = 1
        with pytest.raises(errors.Unavailable) as failed:
            await collect(client.generate("x"))
        assert "10.0.0.7" not in str(failed.value)
        session = await client.create_session()
        with pytest.raises(errors.Unavailable):
            await collect(session.chat("stumble"))
        assert len(edge.pipeline.turns) == 2


async def test_health_is_said_of_each_service_and_watched() -> None:
    serving, down = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    async with running() as edge, grpc.aio.insecure_channel(edge.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", *SERVICES):
            assert (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status == serving
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICES[0]))
        assert (await watch.read()).status == serving
        await edge.server.set_serving(False)
        assert (await watch.read()).status == down
        await edge.server.set_serving(True)
        assert (await watch.read()).status == serving
        await edge.server.stop()
        assert (await watch.read()).status == down
        watch.cancel()


async def test_stop_lets_a_running_turn_end_and_takes_no_new_one() -> None:
    async with connected(drain_timeout_s=5.0) as (edge, client):
        events = client.generate("abc")
        await anext(events)
        stopping = asyncio.create_task(edge.server.stop())
        await asyncio.sleep(0)
        assert text_of(await collect(events)) == "abc"
        await asyncio.wait_for(stopping, 5)
        with pytest.raises(errors.Unavailable):
            await client.model()


async def test_reflection_lists_the_services() -> None:
    assert await reflected_services({}) >= {*SERVICES, "grpc.health.v1.Health"}


async def test_reflection_can_be_off() -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await reflected_services({"reflection": False})
    assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def reflected_services(settings: dict[str, Any], token: str | None = None) -> set[str]:
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    async with running(**settings) as edge, grpc.aio.insecure_channel(edge.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for response in stub.ServerReflectionInfo(iter([request]), metadata=metadata):
            return {service.name for service in response.list_services_response.service}
    raise AssertionError("no answer")


async def test_metrics_count_what_clients_see() -> None:
    async with connected() as (edge, client):
        await collect(client.generate("abc"))
        with pytest.raises(errors.AntiphonError):
            await collect(client.generate("crash"))
        text = generate_latest(edge.metrics.registry).decode()
    labels = 'model_name="echo",role="gateway"'
    assert f"antiphon_generation_tokens_total{{{labels}}} 3.0" in text
    assert f"antiphon_time_to_first_token_seconds_count{{{labels}}} 1.0" in text
    assert f"antiphon_inter_token_latency_seconds_count{{{labels}}} 2.0" in text
    assert f'antiphon_request_success_total{{finished_reason="stop",{labels}}} 1.0' in text
    assert 'antiphon_request_failures_total{model_name="echo",reason="INTERNAL",role="gateway"} 1.0' in text
    assert f"antiphon_num_requests_running{{{labels}}} 0.0" in text


async def test_a_port_in_use_is_refused_by_its_key() -> None:
    async with running() as edge:
        with pytest.raises(errors.InvalidSettings, match=r"gateway\.port"):
            async with running(port=edge.server.port):
                pass
