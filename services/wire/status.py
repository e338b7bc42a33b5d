"""Errors on the wire: one table from AntiphonError to google.rpc.Status and back.

Every status carries an ErrorInfo (domain, stable reason, the error's own fields as metadata); BadRequest, RetryInfo and
ResourceInfo stand beside it where they apply. What is not in the table is INTERNAL with the request's id and nothing
else: never a traceback, a path or an address.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from services.common import errors

DOMAIN = "antiphon"
MAX_TEXT_CHARS = 300
_UNAVAILABLE_TEXT = "the service is not available now; try again"
_INTERNAL_TEXT = "internal error"

Metadata = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Row:
    """How one error looks on the wire.

    fields: attributes that travel in ErrorInfo.metadata. rebuild: the error again, from message and metadata.
    public_text: replaces the message where that may hold paths or addresses. retry_after_s: for RetryInfo, if the error
    has none of its own.
    """

    code: int
    rebuild: Callable[[str, Metadata], errors.AntiphonError]
    fields: tuple[str, ...] = ()
    public_text: str | None = None
    retry_after_s: float | None = None


def _plain(kind: type[errors.AntiphonError]) -> Callable[[str, Metadata], errors.AntiphonError]:
    return lambda message, fields: kind(message)


def _invalid(kind: type[errors.InvalidRequest]) -> Callable[[str, Metadata], errors.AntiphonError]:
    return lambda message, fields: kind(fields["field"], fields["problem"])


def _exhausted(kind: type[errors.Exhausted]) -> Callable[[str, Metadata], errors.AntiphonError]:
    return lambda message, fields: kind(message, float(fields["retry_after_s"]))


def _resource(
    kind: type[errors.NotFound] | type[errors.AlreadyExists],
) -> Callable[[str, Metadata], errors.AntiphonError]:
    return lambda message, fields: kind(fields["resource_type"], fields["name"])


_FIELD = ("field", "problem")
_RESOURCE = ("resource_type", "name")
_RETRY = ("retry_after_s",)
_SERVER_FAULT = "the service cannot serve this model as it is set up"

# Subclasses have their own row, so that they come back as themselves.
TABLE: Mapping[type[errors.AntiphonError], Row] = {
    errors.InvalidRequest: Row(code_pb2.INVALID_ARGUMENT, _invalid(errors.InvalidRequest), _FIELD),
    errors.PromptTooLong: Row(code_pb2.INVALID_ARGUMENT, _invalid(errors.PromptTooLong), _FIELD),
    errors.UnsupportedConfig: Row(
        code_pb2.FAILED_PRECONDITION,
        lambda message, fields: errors.UnsupportedConfig(fields["field"], message),
        ("field",),
        _SERVER_FAULT,
    ),
    errors.InvalidCheckpoint: Row(
        code_pb2.FAILED_PRECONDITION,
        lambda message, fields: errors.InvalidCheckpoint("checkpoint", message),
        public_text=_SERVER_FAULT,
    ),
    errors.InvalidSettings: Row(
        code_pb2.FAILED_PRECONDITION, _plain(errors.InvalidSettings), public_text=_SERVER_FAULT
    ),
    errors.Exhausted: Row(code_pb2.RESOURCE_EXHAUSTED, _exhausted(errors.Exhausted), _RETRY),
    errors.OutOfBlocks: Row(code_pb2.RESOURCE_EXHAUSTED, _exhausted(errors.OutOfBlocks), _RETRY),
    errors.QueueFull: Row(code_pb2.RESOURCE_EXHAUSTED, _exhausted(errors.QueueFull), _RETRY),
    errors.QuotaExceeded: Row(code_pb2.RESOURCE_EXHAUSTED, _exhausted(errors.QuotaExceeded), _RETRY),
    errors.NotFound: Row(code_pb2.NOT_FOUND, _resource(errors.NotFound), _RESOURCE),
    errors.AlreadyExists: Row(code_pb2.ALREADY_EXISTS, _resource(errors.AlreadyExists), _RESOURCE),
    errors.SessionBusy: Row(
        code_pb2.ABORTED,
        lambda message, fields: errors.SessionBusy(fields["session"], int(fields["turn"])),
        ("session", "turn"),
        retry_after_s=1.0,
    ),
    errors.StaleLease: Row(
        code_pb2.ABORTED, _plain(errors.StaleLease), public_text="the turn has been overtaken by another one"
    ),
    errors.Unauthenticated: Row(code_pb2.UNAUTHENTICATED, _plain(errors.Unauthenticated)),
    errors.Unavailable: Row(
        code_pb2.UNAVAILABLE, _plain(errors.Unavailable), public_text=_UNAVAILABLE_TEXT, retry_after_s=1.0
    ),
    errors.TransferFailed: Row(
        code_pb2.UNAVAILABLE,
        lambda message, fields: errors.TransferFailed(fields["cause"], message),
        ("cause",),
        _UNAVAILABLE_TEXT,
        retry_after_s=1.0,
    ),
    errors.DeadlineExceeded: Row(code_pb2.DEADLINE_EXCEEDED, _plain(errors.DeadlineExceeded)),
    errors.NumericsError: Row(
        code_pb2.INTERNAL, _plain(errors.NumericsError), public_text="the model's output is not a number"
    ),
}

# Statuses that gRPC itself makes, without details.
_BARE: Mapping[int, type[errors.AntiphonError]] = {
    code_pb2.UNAVAILABLE: errors.Unavailable,
    code_pb2.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    code_pb2.UNAUTHENTICATED: errors.Unauthenticated,
    code_pb2.RESOURCE_EXHAUSTED: errors.Exhausted,
}


def to_status(error: Exception, request_id: str) -> status_pb2.Status:
    """The status a caller sees for `error`; request_id lets people find it in the logs."""
    row = _row_of(error)
    if row is None or not isinstance(error, errors.AntiphonError):
        info = error_details_pb2.ErrorInfo(domain=DOMAIN, reason=errors.AntiphonError.reason)
        return _status(code_pb2.INTERNAL, f"{_INTERNAL_TEXT} (request {request_id})", request_id, [info])
    info = error_details_pb2.ErrorInfo(domain=DOMAIN, reason=error.reason)
    info.metadata.update({name: _clip(str(getattr(error, name))) for name in row.fields})
    return _status(row.code, _clip(row.public_text or str(error)), request_id, [info, *_details(error, row)])


def from_status(status: status_pb2.Status) -> errors.AntiphonError:
    """The typed error of a status; AntiphonError itself where the reason is unknown here."""
    info = error_details_pb2.ErrorInfo()
    if any(detail.Unpack(info) for detail in status.details) and info.domain == DOMAIN:
        for kind, row in TABLE.items():
            if kind.reason == info.reason and all(name in info.metadata for name in row.fields):
                return row.rebuild(status.message, dict(info.metadata))
        return errors.AntiphonError(status.message)
    return _BARE.get(status.code, errors.AntiphonError)(status.message or code_pb2.Code.Name(status.code))


def _row_of(error: Exception) -> Row | None:
    return next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), None)


def _details(error: errors.AntiphonError, row: Row) -> list[Message]:
    details: list[Message] = []
    if isinstance(error, errors.InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_clip(error.field), description=_clip(error.problem)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, errors.NotFound | errors.AlreadyExists):
        details.append(
            error_details_pb2.ResourceInfo(resource_type=error.resource_type, resource_name=_clip(error.name))
        )
    if isinstance(error, errors.SessionBusy):
        details.append(error_details_pb2.ResourceInfo(resource_type="session", resource_name=error.session))
    retry_after_s = error.retry_after_s if isinstance(error, errors.Exhausted) else row.retry_after_s
    if retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(int(retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return details


def _clip(text: str) -> str:
    """A status travels in a header of limited size, and a message may quote what the caller sent."""
    return text if len(text) <= MAX_TEXT_CHARS else text[: MAX_TEXT_CHARS - 1] + "…"


def _status(code: int, message: str, request_id: str, details: list[Message]) -> status_pb2.Status:
    status = status_pb2.Status(code=code, message=message)
    for detail in [*details, error_details_pb2.RequestInfo(request_id=request_id)]:
        status.details.add().Pack(detail)
    return status
