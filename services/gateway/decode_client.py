"""The gateway's side of DecodeService: one channel an address, one call a turn, failures as typed errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass
from typing import Any, cast

import grpc

from services.common.errors import AntiphonError, Unavailable
from services.gateway.silence import Silence
from services.gateway.status import error_from_rpc
from services.pb.antiphon.internal.v1 import decode_service_pb2 as pb
from services.pb.antiphon.internal.v1 import decode_service_pb2_grpc
from services.wire import keepalive

MAX_MESSAGE_BYTES = 64 * 2**20
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 0),  # the pipeline retries, elsewhere
    *keepalive.INTERNAL_CLIENT,
)
# A replica's own account of a turn that was stopped comes with its next step; without it the turn ends all the same.
_ACCOUNT_TIMEOUT_S = 2.0
_FORGET_TIMEOUT_S = 1.0


@dataclass(slots=True)
class _Connection:
    channel: grpc.aio.Channel
    stub: Any
    num_calls: int = 0


class DecodeClient:
    """Calls decode replicas. Made and used in one event loop; close() ends all calls."""

    def __init__(self) -> None:
        self._connections: dict[str, _Connection] = {}
        self._stopped: dict[str, float] = {}  # call_id -> when to wait no longer, on the loop's clock

    async def generate(
        self,
        address: str,
        request: pb.GenerateRequest,
        timeout_s: float | None,
        traceparent: str | None,
        silence: Silence,
    ) -> AsyncGenerator[pb.GenerateResponse]:
        """The events of one turn, up to `finished`. Closing it early cancels the call, which ends the sequence there.

        Raises Unavailable if the replica is lost, also when its stream ends or skips before `finished`.
        """
        connection = self._connection(address)
        metadata = () if traceparent is None else (("traceparent", traceparent),)
        connection.num_calls += 1
        call = connection.stub.Generate(request, timeout=timeout_s, metadata=metadata)
        try:
            with silence.watching(call):
                num_seen = 0
                while (response := await self._next(call, request.call_id, silence)) is not grpc.aio.EOF:
                    if response.seq != num_seen:
                        raise Unavailable(f"message {response.seq} of the replica's stream came in place of {num_seen}")
                    num_seen += 1
                    if response.WhichOneof("event") == "finished":
                        # The end of the stream: the replica has let go of the turn. Without it the turn has ended too.
                        with contextlib.suppress(grpc.RpcError, Unavailable):
                            await self._next(call, request.call_id, silence)
                        yield response
                        return
                    yield response
                raise Unavailable("the replica's stream ended early")
        except grpc.RpcError as failed:
            raise _error_of(failed) from failed
        finally:
            call.cancel()  # no effect on a call that has ended
            self._stopped.pop(request.call_id, None)
            connection.num_calls -= 1

    async def stop(self, address: str, call_id: str) -> None:
        """Ends the reply of a `generate` that runs: it soon gives `finished`, or raises Unavailable."""
        self._stopped[call_id] = asyncio.get_running_loop().time() + _ACCOUNT_TIMEOUT_S
        with contextlib.suppress(grpc.RpcError):
            request = pb.StopRequest(call_id=call_id)
            await self._connection(address).stub.Stop(request, timeout=_ACCOUNT_TIMEOUT_S)

    async def forget(self, address: str, request: pb.ForgetRequest) -> None:
        """Tells a replica of a deleted session. Raises Unavailable and the like; it costs the session nothing."""
        try:
            await self._connection(address).stub.Forget(request, timeout=_FORGET_TIMEOUT_S)
        except grpc.RpcError as failed:
            raise _error_of(failed) from failed

    async def forget_others(self, addresses: Collection[str]) -> None:
        """Closes the idle channels to every other address: replicas leave, and come again with a new one."""
        for address in self._connections.keys() - set(addresses):
            if self._connections[address].num_calls == 0:
                await self._connections.pop(address).channel.close()

    async def close(self) -> None:
        """Closes all channels."""
        while self._connections:
            _, connection = self._connections.popitem()
            await connection.channel.close()

    async def _next(self, call: Any, call_id: str, silence: Silence) -> Any:
        """The next message, or grpc.aio.EOF."""
        try:
            async with asyncio.timeout_at(self._stopped.get(call_id)):
                message = await call.read()
        except TimeoutError:
            raise Unavailable("the replica has not said how a turn ended") from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if silence.has_ended_call and task is not None and not task.cancelling():
                raise Unavailable("the replica says nothing and is registered no more") from None
            raise
        silence.heard()
        return message

    def _connection(self, address: str) -> _Connection:
        connection = self._connections.get(address)
        if connection is None:
            channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
            stub = decode_service_pb2_grpc.DecodeServiceStub(channel)
            connection = self._connections[address] = _Connection(channel, stub)
        return connection


def _error_of(failed: grpc.RpcError) -> AntiphonError:
    if cast("grpc.Call", failed).code() is grpc.StatusCode.CANCELLED:  # not by us: the replica is shutting down
        return Unavailable("the replica ended the call")
    return error_from_rpc(failed)
