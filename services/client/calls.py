"""What the sync and the async client share: how to connect, what to send, when to try again."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message as ProtoMessage
from grpc_health.v1 import health_pb2

from services.common.errors import AntiphonError, SessionBusy, Unavailable
from services.common.messages import Explanation, Message, ModelInfo, SessionInfo, SessionPage, TurnRequest
from services.common.sampling import SamplingParams
from services.gateway import convert, convert_sessions
from services.gateway.status import error_from_rpc
from services.pb.antiphon.v1 import chat_service_pb2 as chat
from services.pb.antiphon.v1 import session_service_pb2 as sessions

Input = str | Sequence[Message] | Sequence[int]
"""What a turn is about: a user's text, chat messages, or raw token ids."""

MAX_ATTEMPTS = 4
MAX_BUSY_ATTEMPTS = 12  # longer than a lost lease lasts, by default
_BUSY_DELAY_S = 2.0
Reply = TypeVar("Reply")

_CHAT = "/antiphon.v1.ChatService/"
_SESSIONS = "/antiphon.v1.SessionService/"
_FIRST_DELAY_S = 0.1
_NO_CONNECTION = "failed to connect"  # gRPC's own words

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 4 * 2**20),
    ("grpc.max_send_message_length", 16 * 2**20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
)


@dataclass(frozen=True, slots=True)
class ClientTls:
    """PEM files. ca_file None: the system's CAs. cert_file and key_file: for servers that ask for a certificate.

    server_name: expected name in the server's certificate, if it is not the target's host.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files. Raises OSError."""

        def read(path: Path | None) -> bytes | None:
            return None if path is None else path.read_bytes()

        return grpc.ssl_channel_credentials(read(self.ca_file), read(self.key_file), read(self.cert_file))

    def options(self) -> list[tuple[str, str | int]]:
        """Channel options, the usual ones included."""
        names = [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []
        return [*CHANNEL_OPTIONS, *names]


def metadata_of(token: str | None) -> tuple[tuple[str, str], ...]:
    """The headers of a call."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def new_idempotency_key() -> str:
    """A key for one turn."""
    return uuid.uuid4().hex


def generate_request(
    given: Input, session: str | None, sampling: SamplingParams | None, idempotency_key: str | None
) -> chat.GenerateRequest:
    """The request of a turn. sampling None: what the checkpoint says. Raises InvalidRequest."""
    request = convert.turn_to_proto(_turn(given, session, sampling, idempotency_key))
    if sampling is None:
        request.ClearField("sampling")
    return request


def delay_before_retry_s(error: AntiphonError, attempt: int, idempotency_key: str | None) -> float | None:
    """Seconds to wait before attempt number attempt + 1 (attempts count from 1); None: give up and raise the error."""
    if idempotency_key is None:
        return None
    if isinstance(error, SessionBusy) and 1 < attempt < MAX_BUSY_ATTEMPTS:
        return _BUSY_DELAY_S  # with an earlier attempt of this turn, which is lost: its lease ends by itself
    if not isinstance(error, Unavailable) or attempt >= MAX_ATTEMPTS:
        return None
    return _FIRST_DELAY_S * float(2 ** (attempt - 1)) * random.uniform(0.5, 1.5)


def error_of(failed: grpc.RpcError, target: str) -> AntiphonError:
    """The typed error of a failed call. Where no connection came about, the target says more than gRPC does."""
    error = error_from_rpc(failed)
    if isinstance(error, Unavailable) and str(error).startswith(_NO_CONNECTION):
        return Unavailable(f"no gateway answers at {target}")
    return error


@dataclass(frozen=True, slots=True)
class Unary(Generic[Reply]):
    """One unary call: where to, what with, how to read what comes back."""

    path: str
    request: ProtoMessage
    response: type[ProtoMessage]
    read: Callable[[Any], Reply]


def explain(given: Input, session: str | None) -> Unary[Explanation]:
    """Raises InvalidRequest."""
    request = convert.explain_to_proto(_turn(given, session, None, None))
    return Unary(_CHAT + "Explain", request, chat.ExplainResponse, convert.explanation_from_proto)


def tokenize(given: str | Sequence[Message], as_prompt: bool) -> Unary[tuple[int, ...]]:
    """Text as it is or as a raw prompt, or messages with the chat template."""
    if isinstance(given, str) and as_prompt:
        request = chat.TokenizeRequest(prompt=given)
    elif isinstance(given, str):
        request = chat.TokenizeRequest(text=given)
    else:
        request = chat.TokenizeRequest(chat=convert.messages_to_proto(given))
    return Unary(_CHAT + "Tokenize", request, chat.TokenizeResponse, lambda reply: tuple(reply.token_ids))


def detokenize(token_ids: Sequence[int]) -> Unary[str]:
    """Special tokens included."""
    request = chat.DetokenizeRequest(token_ids=token_ids)
    return Unary(_CHAT + "Detokenize", request, chat.DetokenizeResponse, lambda reply: str(reply.text))


def model() -> Unary[ModelInfo]:
    """The model that is served."""
    return Unary(
        _CHAT + "GetModel",
        chat.GetModelRequest(),
        chat.GetModelResponse,
        lambda reply: convert.model_from_proto(reply.model),
    )


def is_serving(service: str) -> Unary[bool]:
    """What grpc.health.v1 says."""
    return Unary(
        "/grpc.health.v1.Health/Check",
        health_pb2.HealthCheckRequest(service=service),
        health_pb2.HealthCheckResponse,
        lambda reply: bool(reply.status == health_pb2.HealthCheckResponse.SERVING),
    )


def create_session(session: str | None, ttl_s: float | None) -> Unary[SessionInfo]:
    """None: the service's choice."""
    ttl = None if ttl_s is None else convert_sessions.duration_of(ttl_s)
    request = sessions.CreateSessionRequest(session_id=session, ttl=ttl)
    return Unary(_SESSIONS + "CreateSession", request, sessions.CreateSessionResponse, _read_session)


def get_session(session: str) -> Unary[SessionInfo]:
    """One session."""
    request = sessions.GetSessionRequest(name=convert_sessions.session_name(session))
    return Unary(_SESSIONS + "GetSession", request, sessions.GetSessionResponse, _read_session)


def list_sessions(page_size: int, page_token: str) -> Unary[SessionPage]:
    """One page."""

    def read(reply: sessions.ListSessionsResponse) -> SessionPage:
        infos = tuple(convert_sessions.session_from_proto(each) for each in reply.sessions)
        return SessionPage(infos, reply.next_page_token)

    request = sessions.ListSessionsRequest(page_size=page_size, page_token=page_token)
    return Unary(_SESSIONS + "ListSessions", request, sessions.ListSessionsResponse, read)


def delete_session(session: str) -> Unary[None]:
    """And its history."""
    request = sessions.DeleteSessionRequest(name=convert_sessions.session_name(session))
    return Unary(_SESSIONS + "DeleteSession", request, sessions.DeleteSessionResponse, lambda reply: None)


def _read_session(reply: Any) -> SessionInfo:
    return convert_sessions.session_from_proto(reply.session)


def _turn(
    given: Input, session: str | None, sampling: SamplingParams | None, idempotency_key: str | None
) -> TurnRequest:
    """A turn as the client sees it: tenant and request id are the server's to fill in."""
    parts = (Message("user", given),) if isinstance(given, str) else given
    return TurnRequest(
        tenant="",
        request_id="",
        session=session,
        messages=tuple(each for each in parts if isinstance(each, Message)),
        token_ids=tuple(each for each in parts if not isinstance(each, Message)),
        sampling=sampling or SamplingParams(),
        idempotency_key=idempotency_key,
    )
