"""The public services: each method parses, calls what stands behind the edge, and converts the reply. No more."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any

import grpc

from services.common.errors import Exhausted, InvalidRequest, QueueFull
from services.common.messages import Delta, Finished, TurnEvent
from services.common.telemetry import Metrics
from services.gateway import convert, convert_sessions
from services.gateway.edge import Call, Context, Edge
from services.gateway.pipeline_api import Sessions, Text, Turns
from services.pb.antiphon.v1 import chat_service_pb2 as chat
from services.pb.antiphon.v1 import chat_service_pb2_grpc, session_service_pb2_grpc
from services.pb.antiphon.v1 import session_service_pb2 as sessions


class ChatServicer(chat_service_pb2_grpc.ChatServiceServicer):
    """antiphon.v1.ChatService.

    A turn's events are pulled one by one and each is written before the next is asked for: what a slow client does not
    read is never piled up here, and after `slow_client_timeout_s` without room on its connection it loses the turn.
    """

    def __init__(
        self,
        edge: Edge,
        turns: Turns,
        text: Text,
        metrics: Metrics,
        max_concurrent_turns: int,
        slow_client_timeout_s: float,
    ) -> None:
        self._edge = edge
        self._turns = turns
        self._text = text
        self._metrics = metrics
        self._max_concurrent_turns = max_concurrent_turns
        self._slow_client_timeout_s = slow_client_timeout_s
        self.num_running_turns = 0

    # The generated base knows handlers that yield; this one writes, to bound the time of each write.
    async def Generate(self, request: chat.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        """Streams one turn."""
        async with self._edge.call(context, "Generate") as call:
            defaults = (await self._text.model()).default_sampling
            turn = convert.turn_from_proto(
                request, call.tenant, call.request_id, call.deadline_s, call.trace.header(), defaults
            )
            if self.num_running_turns >= self._max_concurrent_turns:
                raise QueueFull("as many turns are running as this gateway takes")
            self._count(+1)
            try:
                clock = _TurnClock(self._metrics, call)
                async with aclosing(self._turns.generate(turn)) as events:
                    async for event in events:
                        clock.saw(event)
                        await self._write(context, event)
            finally:
                self._count(-1)

    async def Tokenize(self, request: chat.TokenizeRequest, context: Context) -> chat.TokenizeResponse:
        """Text or messages to token ids."""
        async with self._edge.call(context, "Tokenize"):
            kind = request.WhichOneof("input")
            if kind is None:
                raise InvalidRequest("input", "chat, text or prompt is required")
            if kind == "chat":
                token_ids = await self._text.tokenize_chat(convert.messages_from_proto(request.chat))
            elif kind == "prompt":
                token_ids = await self._text.tokenize(request.prompt, as_prompt=True)
            else:
                token_ids = await self._text.tokenize(request.text)
            return chat.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(self, request: chat.DetokenizeRequest, context: Context) -> chat.DetokenizeResponse:
        """Token ids to text."""
        async with self._edge.call(context, "Detokenize"):
            return chat.DetokenizeResponse(text=await self._text.detokenize(tuple(request.token_ids)))

    async def GetModel(self, request: chat.GetModelRequest, context: Context) -> chat.GetModelResponse:
        """The model's card."""
        async with self._edge.call(context, "GetModel"):
            return chat.GetModelResponse(model=convert.model_to_proto(await self._text.model()))

    async def Explain(self, request: chat.ExplainRequest, context: Context) -> chat.ExplainResponse:
        """Dry run of routing."""
        async with self._edge.call(context, "Explain") as call:
            turn = convert.turn_from_proto(request, call.tenant, call.request_id, call.deadline_s)
            return convert.explanation_to_proto(await self._turns.explain(turn))

    async def _write(self, context: Context, event: TurnEvent) -> None:
        patience = asyncio.timeout(self._slow_client_timeout_s)
        try:
            async with patience:
                await context.write(convert.event_to_proto(event))
        except TimeoutError as error:
            if not patience.expired():
                raise
            raise Exhausted("the client reads too slowly") from error
        except grpc.aio.InternalError as error:  # nothing can be written any more, and nobody is there to be told
            raise asyncio.CancelledError("the client has left") from error

    def _count(self, change: int) -> None:
        self.num_running_turns += change
        self._metrics.set("num_requests_running", self.num_running_turns)


class SessionServicer(session_service_pb2_grpc.SessionServiceServicer):
    """antiphon.v1.SessionService."""

    def __init__(self, edge: Edge, store: Sessions) -> None:
        self._edge = edge
        self._store = store

    async def CreateSession(
        self, request: sessions.CreateSessionRequest, context: Context
    ) -> sessions.CreateSessionResponse:
        """Makes a session."""
        async with self._edge.call(context, "CreateSession") as call:
            session, ttl_s = convert_sessions.create_session_from_proto(request)
            info = await self._store.create(call.tenant, session, ttl_s)
            return sessions.CreateSessionResponse(session=convert_sessions.session_to_proto(info))

    async def GetSession(self, request: sessions.GetSessionRequest, context: Context) -> sessions.GetSessionResponse:
        """Shows a session."""
        async with self._edge.call(context, "GetSession") as call:
            info = await self._store.get(call.tenant, convert_sessions.session_id_of(request.name, "name"))
            return sessions.GetSessionResponse(session=convert_sessions.session_to_proto(info))

    async def ListSessions(
        self, request: sessions.ListSessionsRequest, context: Context
    ) -> sessions.ListSessionsResponse:
        """Lists the tenant's sessions."""
        async with self._edge.call(context, "ListSessions") as call:
            size = convert_sessions.page_size_of(request)
            page = await self._store.list(call.tenant, size, request.page_token)
            return sessions.ListSessionsResponse(
                sessions=[convert_sessions.session_to_proto(info) for info in page.sessions],
                next_page_token=page.next_page_token,
            )

    async def DeleteSession(
        self, request: sessions.DeleteSessionRequest, context: Context
    ) -> sessions.DeleteSessionResponse:
        """Deletes a session."""
        async with self._edge.call(context, "DeleteSession") as call:
            await self._store.delete(call.tenant, convert_sessions.session_id_of(request.name, "name"))
            return sessions.DeleteSessionResponse()


class _TurnClock:
    """Observes what the client of one turn sees: first token, gaps, end, token counts."""

    def __init__(self, metrics: Metrics, call: Call) -> None:
        self._metrics = metrics
        self._arrived_s = call.arrived_s
        self._last_token_s: float | None = None

    def saw(self, event: TurnEvent) -> None:
        now_s = time.monotonic()
        if isinstance(event, Delta) and event.token_ids:
            if self._last_token_s is None:
                self._metrics.observe("time_to_first_token_seconds", now_s - self._arrived_s)
            else:
                gap_s = (now_s - self._last_token_s) / len(event.token_ids)
                self._metrics.observe("inter_token_latency_seconds", gap_s)
            self._last_token_s = now_s
        elif isinstance(event, Finished):
            self._metrics.observe("e2e_request_latency_seconds", now_s - self._arrived_s)
            self._metrics.increment("request_success", finished_reason=event.reason.value)
            self._metrics.increment("prompt_tokens", event.usage.num_prompt_tokens)
            self._metrics.increment("generation_tokens", event.usage.num_generated_tokens)


def register(server: Any, chat_servicer: ChatServicer, session_servicer: SessionServicer) -> tuple[str, ...]:
    """Adds both services to a server; returns their full names."""
    chat_service_pb2_grpc.add_ChatServiceServicer_to_server(chat_servicer, server)
    session_service_pb2_grpc.add_SessionServiceServicer_to_server(session_servicer, server)
    return tuple(
        module.DESCRIPTOR.services_by_name[name].full_name
        for module, name in ((chat, "ChatService"), (sessions, "SessionService"))
    )
