"""The decode replica's own gRPC server: DecodeService for gateways."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final

import grpc
from google.rpc import status_pb2
from grpc_status import rpc_status

from services.common.errors import AntiphonError, InvalidRequest, Unavailable
from services.decode.turn import Admitted, DecodeEvent, DecodeFinished, DecodeRequest, HistoryHolder, TokenChunk
from services.decode.worker import DecodeWorker
from services.pb.antiphon.internal.v1 import decode_service_pb2 as pb
from services.pb.antiphon.internal.v1 import decode_service_pb2_grpc
from services.transfer.base import Identity
from services.wire import keepalive, values
from services.wire.status import to_status

log = logging.getLogger(__name__)

_MAX_MESSAGE_BYTES: Final = 64 * 2**20
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # two replicas must never answer at one address
    *keepalive.INTERNAL_SERVER,
)


class DecodeServer:
    """Listens on host (any free port) for gateways. max_concurrent: most turns at once."""

    def __init__(self, worker: DecodeWorker, incarnation: str, host: str, max_concurrent: int) -> None:
        self._host = host
        self._server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=max_concurrent)
        servicer = DecodeServicer(worker, incarnation)
        decode_service_pb2_grpc.add_DecodeServiceServicer_to_server(servicer, self._server)
        self.address = ""

    async def start(self) -> None:
        """Sets `address`, host:port."""
        port = self._server.add_insecure_port(f"{self._host}:0")
        await self._server.start()
        self.address = f"{self._host}:{port}"

    async def stop(self, grace_s: float) -> None:
        """Takes no new turns, lets running ones end within grace_s, then cancels them."""
        await self._server.stop(grace_s)


class DecodeServicer(decode_service_pb2_grpc.DecodeServiceServicer):
    """One turn a call. The end of the call, however it comes, is the end of the turn."""

    def __init__(self, worker: DecodeWorker, incarnation: str) -> None:
        self._worker = worker
        self._incarnation = incarnation

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateResponse]:
        """See DecodeService."""
        try:
            turn = self._turn(request)
            async with aclosing(self._worker.generate(turn)) as events:
                seq = 0
                async for event in events:
                    yield _response(seq, event)
                    seq += 1
        except AntiphonError as error:
            log.info("turn refused or lost", extra={**_fields(request), "reason": error.reason})
            await _abort(context, to_status(error, request.request_id))
        except Exception as error:
            log.exception("turn failed", extra=_fields(request))
            await _abort(context, to_status(error, request.request_id))
            raise

    async def Stop(self, request: pb.StopRequest, context: Any) -> pb.StopResponse:
        """See DecodeService."""
        self._worker.stop(request.call_id)
        return pb.StopResponse()

    async def Forget(self, request: pb.ForgetRequest, context: Any) -> pb.ForgetResponse:
        """See DecodeService."""
        if request.incarnation != self._incarnation or not request.token_ids:
            return pb.ForgetResponse()
        token_ids = tuple(request.token_ids)
        num_blocks = await self._worker.forget(request.session_digest, token_ids, request.salt)
        return pb.ForgetResponse(num_blocks=num_blocks)

    def _turn(self, request: pb.GenerateRequest) -> DecodeRequest:
        if request.incarnation != self._incarnation:
            raise Unavailable("another process has this address now")
        token_ids = tuple(request.token_ids)
        num_prompt = len(token_ids) - request.num_resumed_tokens
        if num_prompt < 1:
            raise InvalidRequest("token_ids", "a prompt of one token at least is needed")
        return DecodeRequest(
            request_id=request.request_id,
            prompt_token_ids=token_ids[:num_prompt],
            resumed_token_ids=token_ids[num_prompt:],
            sampling=values.sampling_from_proto(request.sampling),
            salt=request.salt,
            holders=tuple(
                HistoryHolder(Identity(each.replica, each.incarnation), each.num_computed_tokens)
                for each in request.holders
                if each.incarnation != self._incarnation
            ),
            session_digest=request.session_digest,
            turn=request.turn,
            fence=request.fence,
            call_id=request.call_id,
        )


async def _abort(context: grpc.aio.ServicerContext[Any, Any], status: status_pb2.Status) -> None:
    await context.abort_with_status(rpc_status.to_status(status))


def _fields(request: pb.GenerateRequest) -> dict[str, object]:
    return {"request_id": request.request_id, "session": request.session_digest, "turn": request.turn}


def _response(seq: int, event: DecodeEvent) -> pb.GenerateResponse:
    if isinstance(event, TokenChunk):
        chunk = pb.TokenChunk(
            index=event.index,
            token_ids=event.token_ids,
            logprobs=values.logprobs_to_proto(event.logprobs),
            prompt_logprobs=values.logprobs_to_proto(event.prompt_logprobs),
        )
        return pb.GenerateResponse(seq=seq, chunk=chunk)
    if isinstance(event, Admitted):
        admitted = pb.Admitted(num_cached_tokens=event.num_cached_tokens, num_reserved_blocks=event.num_reserved_blocks)
        return pb.GenerateResponse(seq=seq, admitted=admitted)
    return pb.GenerateResponse(seq=seq, finished=_finished(event))


def _finished(event: DecodeFinished) -> pb.Finished:
    return pb.Finished(
        reason=values.FINISH_REASONS.number(event.reason),
        usage=values.usage_to_proto(event.usage),
        timings=values.timings_to_proto(event.timings),
        kv_origins=values.origins_to_proto(event.kv_origins),
        prefill_place=values.PREFILL_PLACES.number(event.prefill_place),
        prefill_reason=event.prefill_reason,
        num_computed_tokens=event.num_computed_tokens,
    )
