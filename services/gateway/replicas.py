"""The decode replicas as one gateway sees them: the registry, and what the registry cannot know yet."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from services.common.errors import Unavailable
from services.common.telemetry import Metrics
from services.gateway.silence import Silence
from services.sessions.registry import ReplicaRecord, ReplicaRegistry, Role


class Replicas:
    """Reads the registry once a turn; between heartbeats it knows what this gateway has sent and whom it has lost.

    While the store does not answer, the last list goes on serving turns that need no session.
    """

    def __init__(
        self,
        registry: ReplicaRegistry,
        lost_for_s: float,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """lost_for_s: how long a process that failed a turn is left out; its registration lasts no longer."""
        self._registry = registry
        self._lost_for_s = lost_for_s
        self._metrics = metrics
        self._clock = clock
        self._lost_until_s: dict[str, float] = {}
        self._pending_tokens: Counter[str] = Counter()
        self._last: tuple[ReplicaRecord, ...] = ()

    async def list(self) -> tuple[ReplicaRecord, ...]:
        """The decode replicas that can be expected to answer. Raises Unavailable if none was ever known."""
        try:
            self._last = await self._registry.list(Role.DECODE)
        except Unavailable:
            self._say_store_is_up(False)
            if not self._last:
                raise
        else:
            self._say_store_is_up(True)
        now_s = self._clock()
        self._lost_until_s = {key: until_s for key, until_s in self._lost_until_s.items() if until_s > now_s}
        return tuple(record for record in self._last if record.incarnation not in self._lost_until_s)

    def silence(self, record: ReplicaRecord) -> Silence:
        """To watch a call to the process of this record with: whether it is gone, by the registry alone."""

        async def is_gone() -> bool:
            try:
                registered = await self._registry.list(Role.DECODE)
            except Unavailable:
                return False
            return all(each.incarnation != record.incarnation for each in registered)

        return Silence(is_gone, self._lost_for_s / 2)

    @property
    def pending_tokens(self) -> Mapping[str, int]:
        """Prompt tokens sent to each replica by this gateway that wait for their first token of reply."""
        return self._pending_tokens

    def lost(self, record: ReplicaRecord) -> None:
        """The process of this record has failed a turn: it gets no other until it must have proved to be alive."""
        self._lost_until_s[record.incarnation] = self._clock() + self._lost_for_s

    @asynccontextmanager
    async def sending(self, replica_id: str, num_tokens: int) -> AsyncIterator[Callable[[], None]]:
        """Counts tokens as pending until the function it gives is called, or the block ends."""
        is_pending = True
        self._pending_tokens[replica_id] += num_tokens

        def computed() -> None:
            nonlocal is_pending
            if is_pending:
                is_pending = False
                self._pending_tokens[replica_id] -= num_tokens
                if not self._pending_tokens[replica_id]:
                    del self._pending_tokens[replica_id]

        try:
            yield computed
        finally:
            computed()

    def _say_store_is_up(self, is_up: bool) -> None:
        self._metrics.set("redis_up", float(is_up))
        self._metrics.set("degraded_mode", float(not is_up))
