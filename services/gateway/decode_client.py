"""The gateway's side of DecodeService: one channel an address, one call a turn, failures as typed errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass
from typing import Any, cast

import grpc

from services.common.errors import AntiphonError, Unavailable
from services.gateway.status import error_from_rpc
from services.pb.antiphon.internal.v1 import decode_service_pb2 as pb
from services.pb.antiphon.internal.v1 import decode_service_pb2_grpc

MAX_MESSAGE_BYTES = 64 * 2**20
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 0),  # the pipeline retries, elsewhere
)


@dataclass(slots=True)
class _Connection:
    channel: grpc.aio.Channel
    stub: Any
    num_calls: int = 0


class DecodeClient:
    """Calls decode replicas. Made and used in one event loop; close() ends all calls."""

    def __init__(self) -> None:
        self._connections: dict[str, _Connection] = {}

    async def generate(
        self, address: str, request: pb.GenerateRequest, timeout_s: float | None, traceparent: str | None
    ) -> AsyncGenerator[pb.GenerateResponse]:
        """The events of one turn, up to `finished`. Closing it early cancels the call, which ends the sequence there.

        Raises Unavailable if the replica is lost, also when its stream ends or skips before `finished`.
        """
        connection = self._connection(address)
        metadata = () if traceparent is None else (("traceparent", traceparent),)
        connection.num_calls += 1
        call = connection.stub.Generate(request, timeout=timeout_s, metadata=metadata)
        try:
            num_seen = 0
            async for response in call:
                if response.seq != num_seen:
                    raise Unavailable(f"message {response.seq} of the replica's stream came in place of {num_seen}")
                num_seen += 1
                yield response
                if response.WhichOneof("event") == "finished":
                    return
            raise Unavailable("the replica's stream ended early")
        except grpc.RpcError as failed:
            raise _error_of(failed) from failed
        finally:
            call.cancel()  # no effect on a call that has ended
            connection.num_calls -= 1

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
