"""Fails at once while the store does not answer, instead of letting every caller wait for it; looks again by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.common.errors import Unavailable

NUM_FAILURES = 2  # in a row: one lost answer is no outage
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 2.0


class Breaker:
    """Of one connection to the store, used on one event loop.

    Closed: calls pass. After NUM_FAILURES in a row it is open: calls are refused until the pause is over. Then one call
    passes as a trial, alone: if the store answers it the breaker is closed, otherwise the next pause is twice as long.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._open_until_s = 0.0
        self._is_tried = False

    @property
    def is_open(self) -> bool:
        """Calls are refused, but for a trial now and then."""
        return self._num_failures >= NUM_FAILURES

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around one call to the store. Raises Unavailable instead of letting it pass.

        An OSError or TimeoutError that leaves the block is a failure, any other end an answer; a call that is cancelled
        says nothing.
        """
        is_trial = self.is_open
        if is_trial:
            if self._is_tried or self._clock() < self._open_until_s:
                raise Unavailable("the session store did not answer just now")
            self._is_tried = True
        try:
            yield
        except (OSError, TimeoutError):
            self._failed(is_trial)
            raise
        except Exception:
            self._num_failures = 0
            raise
        else:
            self._num_failures = 0
            self._pause_s = FIRST_PAUSE_S
        finally:
            if is_trial:
                self._is_tried = False

    def _failed(self, is_trial: bool) -> None:
        self._num_failures += 1
        if is_trial:
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        if self._num_failures == NUM_FAILURES or is_trial:
            self._open_until_s = self._clock() + self._pause_s
