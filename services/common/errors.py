"""Every error antiphon raises on purpose, as one tree.

    AntiphonError
    ├── InvalidRequest          the caller's mistake: says which field, and what to do
    │   └── PromptTooLong
    ├── UnsupportedConfig       a config.json that cannot be served exactly: names the field
    ├── InvalidCheckpoint       a weight file that cannot be trusted: names file and tensor
    ├── InvalidSettings         a configuration file with an unknown key or an impossible value
    ├── Exhausted               too full right now: try again after `retry_after_s`
    │   ├── OutOfBlocks
    │   ├── QueueFull
    │   └── QuotaExceeded
    ├── NotFound                a session or model that does not exist (or is another tenant's)
    ├── AlreadyExists           the id asked for is taken
    ├── SessionBusy             a turn is already running on the session
    ├── StaleLease              the fencing token has been overtaken
    ├── Unauthenticated
    ├── Unavailable             a replica or a store that cannot be reached now
    ├── TransferFailed          KV blocks did not arrive, or were not what they claimed to be
    ├── DeadlineExceeded        the caller's deadline passed before the work was done
    └── NumericsError           the model produced NaN: the sequence is ended, never sampled

`reason` is stable and goes on the wire (google.rpc.ErrorInfo); the message is for people and carries no path or address
when it can reach a client.
"""

from __future__ import annotations

from typing import ClassVar


class AntiphonError(Exception):
    """Base of all errors raised on purpose."""

    reason: ClassVar[str] = "INTERNAL"

    def __reduce__(self) -> tuple[object, ...]:
        # The default calls the constructor with the formatted text alone: wrong where it takes other arguments.
        return _rebuild, (type(self), self.args, vars(self))


def _rebuild(kind: type[AntiphonError], args: tuple[object, ...], attributes: dict[str, object]) -> AntiphonError:
    error = kind.__new__(kind, *args)
    vars(error).update(attributes)
    return error


class InvalidRequest(AntiphonError):
    """A field of a request has a value that cannot be served.

    `field` is the request's field path, for example `sampling.temperature`.
    """

    reason = "INVALID_REQUEST"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room for a single token of reply."""

    reason = "PROMPT_TOO_LONG"


class UnsupportedConfig(AntiphonError):
    """A config.json asks for something the engine cannot compute exactly; `field` names it."""

    reason = "UNSUPPORTED_CONFIG"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"config.json: {field}: {problem}")
        self.field = field


class InvalidCheckpoint(AntiphonError):
    """A weight file is damaged or does not fit the config; `tensor` names the culprit where one is known."""

    reason = "INVALID_CHECKPOINT"

    def __init__(self, file: str, problem: str, tensor: str | None = None) -> None:
        super().__init__(f"{file}: {tensor + ': ' if tensor else ''}{problem}")
        self.file = file
        self.tensor = tensor


class InvalidSettings(AntiphonError):
    """The configuration has an unknown key or an impossible value."""

    reason = "INVALID_SETTINGS"


class Exhausted(AntiphonError):
    """There is no room now; trying again after `retry_after_s` seconds may succeed."""

    reason = "EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OutOfBlocks(Exhausted):
    """The block pool has too few free blocks."""

    reason = "OUT_OF_BLOCKS"


class QueueFull(Exhausted):
    """Too many requests are waiting already."""

    reason = "QUEUE_FULL"


class QuotaExceeded(Exhausted):
    """The tenant holds as many bytes as it may."""

    reason = "QUOTA_EXCEEDED"


class NotFound(AntiphonError):
    """The named resource does not exist, or belongs to another tenant (the two look the same on purpose)."""

    reason = "NOT_FOUND"

    def __init__(self, resource_type: str, name: str) -> None:
        super().__init__(f"{resource_type} {name!r} not found")
        self.resource_type = resource_type
        self.name = name


class AlreadyExists(AntiphonError):
    """The id asked for a new resource is taken already."""

    reason = "ALREADY_EXISTS"

    def __init__(self, resource_type: str, name: str) -> None:
        super().__init__(f"{resource_type} {name!r} exists already")
        self.resource_type = resource_type
        self.name = name


class SessionBusy(AntiphonError):
    """A turn is running on the session already; `turn` is its number."""

    reason = "SESSION_BUSY"

    def __init__(self, session: str, turn: int) -> None:
        super().__init__(f"session {session!r} is busy with turn {turn}; wait for it to end or cancel it")
        self.session = session
        self.turn = turn


class StaleLease(AntiphonError):
    """A newer lease exists on the session: what this holder writes is refused."""

    reason = "STALE_LEASE"


class Unauthenticated(AntiphonError):
    """No token, or not a valid one."""

    reason = "UNAUTHENTICATED"


class Unavailable(AntiphonError):
    """A replica or store cannot be reached now; another may."""

    reason = "UNAVAILABLE"


class TransferFailed(AntiphonError):
    """KV blocks did not arrive, or failed verification; the receiver recomputes. `cause` labels the metric.

    must_quarantine: something may still write to the target blocks, so they must not be used again for now.
    """

    reason = "TRANSFER_FAILED"

    def __init__(self, cause: str, message: str, *, must_quarantine: bool = False) -> None:
        super().__init__(f"{cause}: {message}")
        self.cause = cause
        self.message = message
        self.must_quarantine = must_quarantine


class DeadlineExceeded(AntiphonError):
    """The deadline passed before the work was done."""

    reason = "DEADLINE_EXCEEDED"


class NumericsError(AntiphonError):
    """The logits of a sequence hold NaN or only infinities; sampling from them would be a silently wrong token."""

    reason = "NUMERICS"
