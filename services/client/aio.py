"""The async client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Self

import grpc

from services.client import calls
from services.client.calls import ClientTls, Input, Reply, Unary
from services.common.errors import NotFound
from services.common.messages import Explanation, Finished, Message, ModelInfo, SessionInfo, SessionPage, TurnEvent
from services.common.sampling import SamplingParams
from services.gateway import convert
from services.pb.antiphon.v1 import chat_service_pb2_grpc

# A cancelled call ends a moment later, and gRPC says so to its event loop, which should still be there.
_SETTLE_S = 0.01


class AsyncClient:
    """A connection to a gateway at `target` (host:port), made inside a running event loop. Close it, or `async with`.

    token: bearer token. tls: None is plain text. timeout_s: deadline of calls that are not turns, in seconds.
    """

    def __init__(
        self, target: str, token: str | None = None, tls: ClientTls | None = None, timeout_s: float = 30.0
    ) -> None:
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target, options=calls.CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(target, tls.credentials(), options=tls.options())
        self._chat = chat_service_pb2_grpc.ChatServiceStub(self._channel)
        self._target = target
        self._metadata = calls.metadata_of(token)
        self._timeout_s = timeout_s
        self._has_cancelled = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; turns that run are cancelled."""
        await self._channel.close()
        if self._has_cancelled:
            await asyncio.sleep(_SETTLE_S)

    async def generate(
        self,
        given: Input,
        *,
        session: str | None = None,
        sampling: SamplingParams | None = None,
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[TurnEvent]:
        """One turn: Started, Deltas, Finished. session: its id. Closing the generator early cancels the turn."""
        request = calls.generate_request(given, session, sampling, idempotency_key)
        attempt, has_begun = 0, False
        while True:
            attempt += 1
            call: Any = self._chat.Generate(request, timeout=timeout_s, metadata=self._metadata)
            try:
                while (response := await call.read()) is not grpc.aio.EOF:
                    has_begun = True
                    event = convert.event_from_proto(response)
                    if isinstance(event, Finished):
                        with contextlib.suppress(grpc.RpcError):
                            await call.read()  # the call is over then, also for who leaves with this event
                        yield event
                        return
                    if event is not None:
                        yield event
                return
            except grpc.RpcError as failed:
                error = calls.error_of(failed, self._target)
                delay_s = calls.delay_before_retry_s(error, attempt, None if has_begun else idempotency_key)
                if delay_s is None:
                    raise error from failed
            finally:
                self._has_cancelled |= call.cancel()  # no effect on a call that has ended
            await asyncio.sleep(delay_s)

    async def explain(self, given: Input, *, session: str | None = None) -> Explanation:
        """Where the turn would run now, and why. Nothing runs."""
        return await self._call(calls.explain(given, session))

    async def tokenize(self, given: str | Sequence[Message], *, as_prompt: bool = False) -> tuple[int, ...]:
        """Token ids of text as it is or as a raw prompt, or of messages with the chat template."""
        return await self._call(calls.tokenize(given, as_prompt))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return await self._call(calls.detokenize(token_ids))

    async def model(self) -> ModelInfo:
        """The model that is served."""
        return await self._call(calls.model())

    async def is_serving(self, service: str = "") -> bool:
        """What grpc.health.v1 says of the server, or of one service by its full name."""
        return await self._call(calls.is_serving(service))

    async def create_session(self, session: str | None = None, *, ttl_s: float | None = None) -> AsyncSession:
        """Makes a session; None: the service picks an id, or its default TTL. Raises AlreadyExists."""
        info = await self._call(calls.create_session(session, ttl_s))
        return AsyncSession(self, info.session)

    async def open_session(self, session: str) -> AsyncSession:
        """The session of that id, made if it does not exist."""
        try:
            await self.get_session(session)
        except NotFound:
            return await self.create_session(session)
        return AsyncSession(self, session)

    async def get_session(self, session: str) -> SessionInfo:
        """Raises NotFound."""
        return await self._call(calls.get_session(session))

    async def list_sessions(self, page_size: int = 0, page_token: str = "") -> SessionPage:
        """One page; page_size 0 is the service's default."""
        return await self._call(calls.list_sessions(page_size, page_token))

    async def delete_session(self, session: str) -> None:
        """Raises NotFound, SessionBusy."""
        await self._call(calls.delete_session(session))

    async def _call(self, unary: Unary[Reply]) -> Reply:
        method = self._channel.unary_unary(unary.path, type(unary.request).SerializeToString, unary.response.FromString)
        try:
            return unary.read(await method(unary.request, timeout=self._timeout_s, metadata=self._metadata))
        except grpc.RpcError as failed:
            raise calls.error_of(failed, self._target) from failed


class AsyncSession:
    """A session of a client; `id` is the last part of its name."""

    def __init__(self, client: AsyncClient, session: str) -> None:
        self._client = client
        self.id = session

    def chat(
        self, given: Input, *, sampling: SamplingParams | None = None, timeout_s: float | None = None
    ) -> AsyncGenerator[TurnEvent]:
        """One turn of the session: Started, Deltas, Finished."""
        key = calls.new_idempotency_key()
        return self._client.generate(
            given, session=self.id, sampling=sampling, idempotency_key=key, timeout_s=timeout_s
        )

    async def explain(self, given: Input) -> Explanation:
        """Where the session's next turn would run."""
        return await self._client.explain(given, session=self.id)

    async def info(self) -> SessionInfo:
        """The session as it is now."""
        return await self._client.get_session(self.id)

    async def delete(self) -> None:
        """Deletes it and its history."""
        await self._client.delete_session(self.id)
