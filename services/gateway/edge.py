"""What every call at the edge goes through: parsing, the caller's tenant, ids, deadline, errors, logs.

`EdgeInterceptor` guards all services but health: no valid token, or bytes that are no message, and the handler is never
reached. `Edge.call` wraps the body of a handler.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from services.common.errors import AntiphonError, DeadlineExceeded, InvalidRequest
from services.common.telemetry import Metrics, TraceContext
from services.gateway.auth import Authenticator
from services.gateway.status import abort

log = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
TRACE_HEADER = "traceparent"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEALTH = "/grpc.health.v1.Health/"

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One RPC as its handler sees it. deadline_s and arrived_s: on time.monotonic()."""

    tenant: str
    request_id: str
    trace: TraceContext
    arrived_s: float
    deadline_s: float


class Edge:
    """Opens calls: knows who may call, how long a call may take, and where failures are counted."""

    def __init__(self, authenticator: Authenticator, default_deadline_s: float, metrics: Metrics) -> None:
        self._authenticator = authenticator
        self._default_deadline_s = default_deadline_s
        self._metrics = metrics

    @asynccontextmanager
    async def call(self, context: Context, method: str) -> AsyncIterator[Call]:
        """Runs a handler's body under its deadline; what it raises ends the call with a status, and is counted.

        Cancellation (the client left) passes through.
        """
        metadata = metadata_of(context)
        request_id = request_id_of(metadata)
        await context.send_initial_metadata(((REQUEST_ID_HEADER, request_id),))
        trace = TraceContext.parse(metadata.get(TRACE_HEADER))
        remaining_s = context.time_remaining()
        allowed_s = self._default_deadline_s if remaining_s is None else remaining_s
        arrived_s = time.monotonic()
        limit = asyncio.timeout(allowed_s)
        try:
            async with limit:
                yield Call(
                    tenant=self._authenticator.tenant_of(metadata.get("authorization")),
                    request_id=request_id,
                    trace=trace.child() if trace else TraceContext.new(),
                    arrived_s=arrived_s,
                    deadline_s=arrived_s + allowed_s,
                )
        except Exception as error:
            late = isinstance(error, TimeoutError) and limit.expired()
            seen = DeadlineExceeded("the deadline passed before the work was done") if late else error
            self._record(seen, method, request_id, arrived_s)
            await abort(context, seen, request_id)

    def _record(self, error: Exception, method: str, request_id: str, arrived_s: float) -> None:
        is_expected = isinstance(error, AntiphonError)
        reason = error.reason if isinstance(error, AntiphonError) else AntiphonError.reason
        self._metrics.increment("request_failures", reason=reason)
        level = logging.INFO if is_expected else logging.ERROR
        fields = {"request_id": request_id, "reason": reason, "duration_ms": (time.monotonic() - arrived_s) * 1e3}
        log.log(level, "%s failed", method, extra=fields, exc_info=None if is_expected else error)


class EdgeInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a valid token, and requests that do not parse (gRPC alone would say INTERNAL)."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Wraps the handler of every method but health's."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_HEALTH):
            return handler
        if handler.unary_unary is not None:
            wrapped = self._guard_unary(handler.unary_unary, handler.request_deserializer)
            return grpc.unary_unary_rpc_method_handler(wrapped, None, handler.response_serializer)
        if handler.unary_stream is not None:
            wrapped = self._guard_unary(handler.unary_stream, handler.request_deserializer)
            return grpc.unary_stream_rpc_method_handler(wrapped, None, handler.response_serializer)
        assert handler.stream_stream is not None, "no method here is client-streaming"
        guarded = self._guard_stream(handler.stream_stream)
        return grpc.stream_stream_rpc_method_handler(guarded, handler.request_deserializer, handler.response_serializer)

    def _guard_unary(self, behaviour: Any, deserialize: Callable[[bytes], Any]) -> Any:
        async def guarded(data: bytes, context: Context) -> Any:
            await self._check_token(context)
            try:
                request = deserialize(data)
            except DecodeError:
                request_id = request_id_of(metadata_of(context))
                await abort(
                    context, InvalidRequest("request", "the bytes are not a message of this method"), request_id
                )
            return await behaviour(request, context)

        return guarded

    def _guard_stream(self, behaviour: Any) -> Any:
        async def guarded(requests: Any, context: Context) -> Any:
            await self._check_token(context)
            async for response in behaviour(requests, context):
                yield response

        return guarded

    async def _check_token(self, context: Context) -> None:
        metadata = metadata_of(context)
        try:
            self._authenticator.tenant_of(metadata.get("authorization"))
        except AntiphonError as error:
            await abort(context, error, request_id_of(metadata))


def metadata_of(context: Context) -> dict[str, str]:
    """The call's text metadata; of a key that comes twice, the last value."""
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def request_id_of(metadata: dict[str, str]) -> str:
    """The caller's own id if it is a harmless one, a new one otherwise."""
    given = metadata.get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
