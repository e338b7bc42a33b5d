"""A replica that hangs and still answers pings (gRPC's own threads do): its registration tells, and ends the wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Silence:
    """Cancels a call that says nothing while its replica is not registered any more.

    is_gone: whether it is not. interval_s: between two looks. Two in a row have to find it gone: a store that has
    restarted empty knows it again after a heartbeat. has_ended_call: it was this that has cancelled the call.
    """

    def __init__(self, is_gone: Callable[[], Awaitable[bool]], interval_s: float) -> None:
        self.has_ended_call = False
        self._is_gone = is_gone
        self._interval_s = interval_s
        self._is_silent = True

    @contextmanager
    def watching(self, call: Any) -> Iterator[None]:
        """The call is watched until the context ends."""
        task = asyncio.get_running_loop().create_task(self._watch(call))
        try:
            yield
        finally:
            task.cancel()

    def heard(self) -> None:
        """The replica has said something."""
        self._is_silent = False

    async def _watch(self, call: Any) -> None:
        num_missed = 0
        while num_missed < 2:
            self._is_silent = True
            await asyncio.sleep(self._interval_s)
            is_missed = self._is_silent and await self._is_gone()
            num_missed = num_missed + 1 if is_missed else 0
        self.has_ended_call = True
        call.cancel()
