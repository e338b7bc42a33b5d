"""Session protos to and from the types of services.common, both ways. Reading validates, as in convert.py."""

from __future__ import annotations

import re
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from services.common.errors import InvalidRequest
from services.common.messages import SessionHolder, SessionInfo
from services.pb.antiphon.v1 import session_service_pb2 as sessions

SESSION_PREFIX: Final = "sessions/"
MAX_PAGE_SIZE: Final = 1000
DEFAULT_PAGE_SIZE: Final = 50

_SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NANOSECONDS = 1_000_000_000
_MICROSECONDS = 1_000_000


def session_name(session: str | None) -> str:
    """sessions/{id}; empty without a session."""
    return SESSION_PREFIX + session if session else ""


def session_id_of(name: str, field: str) -> str:
    """The id in sessions/{id}. Raises InvalidRequest, naming `field`."""
    session = name.removeprefix(SESSION_PREFIX)
    if not name.startswith(SESSION_PREFIX) or not _SESSION_ID.fullmatch(session):
        raise InvalidRequest(field, "must be sessions/{id}, the id 1 to 128 letters, digits, '.', '_' or '-'")
    return session


def create_session_from_proto(request: sessions.CreateSessionRequest) -> tuple[str | None, float | None]:
    """The id and the TTL in seconds that were asked for; None for what was not."""
    session = request.session_id if request.HasField("session_id") else None
    if session is not None and not _SESSION_ID.fullmatch(session):
        raise InvalidRequest("session_id", "1 to 128 letters, digits, '.', '_' or '-', the first a letter or digit")
    if not request.HasField("ttl"):
        return session, None
    ttl_s = request.ttl.seconds + request.ttl.nanos / _NANOSECONDS
    if ttl_s <= 0 or not 0 <= request.ttl.nanos < _NANOSECONDS:
        raise InvalidRequest("ttl", "must be a positive duration")
    return session, ttl_s


def page_size_of(request: sessions.ListSessionsRequest) -> int:
    """The page size that was asked for, or the default."""
    if request.page_size > MAX_PAGE_SIZE:
        raise InvalidRequest("page_size", f"at most {MAX_PAGE_SIZE}")
    return request.page_size or DEFAULT_PAGE_SIZE


def session_to_proto(info: SessionInfo) -> sessions.Session:
    """A session; it expires ttl after its last turn."""
    return sessions.Session(
        name=session_name(info.session),
        model=info.model,
        create_time=_timestamp(info.created_at_s),
        update_time=_timestamp(info.updated_at_s),
        expire_time=_timestamp(info.updated_at_s + info.ttl_s),
        ttl=duration_of(info.ttl_s),
        num_turns=info.num_turns,
        num_prompt_tokens=info.num_prompt_tokens,
        num_generated_tokens=info.num_generated_tokens,
        holders=[
            sessions.SessionHolder(**{name: getattr(each, name) for name in SessionHolder.__slots__})
            for each in info.holders
        ],
        held_bytes=info.held_bytes,
        active_turn=info.active_turn,
    )


def session_from_proto(message: sessions.Session) -> SessionInfo:
    """A session."""
    return SessionInfo(
        session=message.name.removeprefix(SESSION_PREFIX),
        model=message.model,
        created_at_s=message.create_time.ToMicroseconds() / _MICROSECONDS,
        updated_at_s=message.update_time.ToMicroseconds() / _MICROSECONDS,
        ttl_s=message.ttl.ToNanoseconds() / _NANOSECONDS,
        num_turns=message.num_turns,
        num_prompt_tokens=message.num_prompt_tokens,
        num_generated_tokens=message.num_generated_tokens,
        holders=tuple(SessionHolder(each.replica, each.num_computed_tokens, each.tier) for each in message.holders),
        held_bytes=message.held_bytes,
        active_turn=message.active_turn if message.HasField("active_turn") else None,
    )


def duration_of(seconds: float) -> Duration:
    """Seconds as a Duration, to the nanosecond."""
    duration = Duration()
    duration.FromNanoseconds(round(seconds * _NANOSECONDS))
    return duration


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMicroseconds(round(seconds * _MICROSECONDS))  # finer than that a float does not go
    return timestamp
