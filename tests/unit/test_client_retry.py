"""Which failed turns the client sends again, and which it must not."""

from __future__ import annotations

from services.client.calls import MAX_ATTEMPTS, MAX_BUSY_ATTEMPTS, delay_before_retry_s
from services.common.errors import AntiphonError, Exhausted, SessionBusy, Unavailable
from services.common.settings import SessionSettings

BUSY = SessionBusy("s", 3)


def delays(error: AntiphonError, attempts: range, key: str | None = "key") -> list[bool]:
    return [delay_before_retry_s(error, attempt, key) is not None for attempt in attempts]


def test_only_what_was_unavailable_and_has_a_key_is_sent_again() -> None:
    assert delays(Unavailable("lost"), range(1, MAX_ATTEMPTS + 1)) == [True] * (MAX_ATTEMPTS - 1) + [False]
    assert delays(Unavailable("lost"), range(1, 3), key=None) == [False, False]
    assert delays(Exhausted("full"), range(1, 3)) == [False, False]


def test_a_session_that_a_lost_attempt_keeps_busy_is_waited_for_and_one_that_others_use_is_not() -> None:
    assert delays(BUSY, range(1, 3)) == [False, True]
    assert delays(BUSY, range(2, MAX_BUSY_ATTEMPTS + 1)) == [True] * (MAX_BUSY_ATTEMPTS - 2) + [False]
    waited_s = sum(delay_before_retry_s(BUSY, attempt, "key") or 0.0 for attempt in range(2, MAX_BUSY_ATTEMPTS))
    assert waited_s > SessionSettings().lease_ttl_s
