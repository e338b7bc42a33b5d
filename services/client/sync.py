"""The sync client: method for method the async one, over a plain gRPC channel (no event loop, no thread of ours)."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Self

import grpc

from services.client import calls
from services.client.calls import ClientTls, Input, Reply, Unary
from services.common.errors import NotFound
from services.common.messages import Explanation, Message, ModelInfo, SessionInfo, SessionPage, TurnEvent
from services.common.sampling import SamplingParams
from services.gateway import convert
from services.pb.antiphon.v1 import chat_service_pb2_grpc


class Client:
    """A connection to a gateway at `target` (host:port). Close it, or use `with`.

    token: bearer token. tls: None is plain text. timeout_s: deadline of calls that are not turns, in seconds.
    """

    def __init__(
        self, target: str, token: str | None = None, tls: ClientTls | None = None, timeout_s: float = 30.0
    ) -> None:
        if tls is None:
            self._channel = grpc.insecure_channel(target, options=calls.CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, tls.credentials(), options=tls.options())
        self._chat = chat_service_pb2_grpc.ChatServiceStub(self._channel)
        self._target = target
        self._metadata = calls.metadata_of(token)
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; turns that run are cancelled."""
        self._channel.close()

    def generate(
        self,
        given: Input,
        *,
        session: str | None = None,
        sampling: SamplingParams | None = None,
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
    ) -> Generator[TurnEvent, None, None]:
        """One turn: Started, Deltas, Finished. session: its id. Closing the generator early cancels the turn."""
        request = calls.generate_request(given, session, sampling, idempotency_key)
        attempt, has_begun = 0, False
        while True:
            attempt += 1
            call = self._chat.Generate(request, timeout=timeout_s, metadata=self._metadata)
            try:
                for response in call:
                    has_begun = True
                    event = convert.event_from_proto(response)
                    if event is not None:
                        yield event
                return
            except grpc.RpcError as failed:
                error = calls.error_of(failed, self._target)
                delay_s = calls.delay_before_retry_s(error, attempt, None if has_begun else idempotency_key)
                if delay_s is None:
                    raise error from failed
            finally:
                call.cancel()  # no effect on a call that has ended
            time.sleep(delay_s)

    def explain(self, given: Input, *, session: str | None = None) -> Explanation:
        """Where the turn would run now, and why. Nothing runs."""
        return self._call(calls.explain(given, session))

    def tokenize(self, given: str | Sequence[Message], *, as_prompt: bool = False) -> tuple[int, ...]:
        """Token ids of text as it is or as a raw prompt, or of messages with the chat template."""
        return self._call(calls.tokenize(given, as_prompt))

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return self._call(calls.detokenize(token_ids))

    def model(self) -> ModelInfo:
        """The model that is served."""
        return self._call(calls.model())

    def is_serving(self, service: str = "") -> bool:
        """What grpc.health.v1 says of the server, or of one service by its full name."""
        return self._call(calls.is_serving(service))

    def create_session(self, session: str | None = None, *, ttl_s: float | None = None) -> Session:
        """Makes a session; None: the service picks an id, or its default TTL. Raises AlreadyExists."""
        info = self._call(calls.create_session(session, ttl_s))
        return Session(self, info.session)

    def open_session(self, session: str) -> Session:
        """The session of that id, made if it does not exist."""
        try:
            self.get_session(session)
        except NotFound:
            return self.create_session(session)
        return Session(self, session)

    def get_session(self, session: str) -> SessionInfo:
        """Raises NotFound."""
        return self._call(calls.get_session(session))

    def list_sessions(self, page_size: int = 0, page_token: str = "") -> SessionPage:
        """One page; page_size 0 is the service's default."""
        return self._call(calls.list_sessions(page_size, page_token))

    def delete_session(self, session: str) -> None:
        """Raises NotFound, SessionBusy."""
        self._call(calls.delete_session(session))

    def _call(self, unary: Unary[Reply]) -> Reply:
        method = self._channel.unary_unary(unary.path, type(unary.request).SerializeToString, unary.response.FromString)
        try:
            return unary.read(method(unary.request, timeout=self._timeout_s, metadata=self._metadata))
        except grpc.RpcError as failed:
            raise calls.error_of(failed, self._target) from failed


class Session:
    """A session of a client; `id` is the last part of its name."""

    def __init__(self, client: Client, session: str) -> None:
        self._client = client
        self.id = session

    def chat(
        self, given: Input, *, sampling: SamplingParams | None = None, timeout_s: float | None = None
    ) -> Generator[TurnEvent, None, None]:
        """One turn of the session: Started, Deltas, Finished."""
        key = calls.new_idempotency_key()
        return self._client.generate(
            given, session=self.id, sampling=sampling, idempotency_key=key, timeout_s=timeout_s
        )

    def explain(self, given: Input) -> Explanation:
        """Where the session's next turn would run."""
        return self._client.explain(given, session=self.id)

    def info(self) -> SessionInfo:
        """The session as it is now."""
        return self._client.get_session(self.id)

    def delete(self) -> None:
        """Deletes it and its history."""
        self._client.delete_session(self.id)
