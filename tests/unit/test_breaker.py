"""While the store does not answer callers are refused at once, and it is asked again by itself."""

from __future__ import annotations

import pytest

from services.common.errors import Unavailable
from services.sessions.breaker import FIRST_PAUSE_S, LONGEST_PAUSE_S, NUM_FAILURES, Breaker


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock)


def fail(breaker: Breaker, error: type[Exception] = TimeoutError) -> None:
    with pytest.raises(error), breaker.call():
        raise error


def passes(breaker: Breaker) -> bool:
    try:
        with breaker.call():
            return True
    except Unavailable:
        return False


def opened(breaker: Breaker) -> Breaker:
    for _ in range(NUM_FAILURES):
        fail(breaker)
    return breaker


def test_one_lost_answer_is_no_outage(breaker: Breaker) -> None:
    for _ in range(5):
        fail(breaker)
        assert passes(breaker)


def test_a_store_that_does_not_answer_is_not_asked_for_a_while(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    assert not passes(breaker)
    clock.now_s += FIRST_PAUSE_S * 0.9
    assert not passes(breaker)
    clock.now_s += FIRST_PAUSE_S * 0.2
    assert passes(breaker)
    assert not breaker.is_open


def test_one_call_alone_tries_whether_it_is_back(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    clock.now_s += FIRST_PAUSE_S
    with breaker.call():
        assert not passes(breaker)
    assert passes(breaker)


def test_pauses_grow_up_to_a_limit_and_shrink_after_an_answer(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    for _ in range(10):
        clock.now_s += LONGEST_PAUSE_S
        fail(breaker)
    clock.now_s += LONGEST_PAUSE_S * 0.9
    assert not passes(breaker)
    clock.now_s += LONGEST_PAUSE_S * 0.2
    assert passes(breaker)
    opened(breaker)
    clock.now_s += FIRST_PAUSE_S
    assert passes(breaker)


def test_an_error_that_the_store_answers_is_an_answer(breaker: Breaker) -> None:
    for _ in range(10):
        fail(breaker, ValueError)
    assert passes(breaker)


def test_a_trial_that_is_cancelled_leaves_room_for_another(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    clock.now_s += FIRST_PAUSE_S
    with pytest.raises(KeyboardInterrupt), breaker.call():
        raise KeyboardInterrupt
    assert passes(breaker)
