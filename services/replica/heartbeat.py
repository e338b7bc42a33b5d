"""Tells the registry that a replica is alive and how busy it is: once an interval, and when its load changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from services.common.errors import StaleLease, Unavailable
from services.common.telemetry import Metrics
from services.engine.engine import Engine, EngineStats
from services.engine.loop import EngineLoop
from services.sessions.registry import ReplicaRecord, ReplicaRegistry

log = logging.getLogger(__name__)

_MIN_INTERVAL_S = 0.05


class Heartbeat:
    """Registers `record`, kept current by the engine's stats, until `stop`.

    max_step_s: an engine that answers no call for so long hangs. extend: adds what only the owner knows. after_beat:
    called after each report that arrived. failure: set, and the last report sent, when this process should end: a
    younger one has replaced it, or its engine hangs.
    """

    def __init__(
        self, registry: ReplicaRegistry, record: ReplicaRecord, loop: EngineLoop, metrics: Metrics, *,
        interval_s: float, ttl_s: float, max_step_s: float,
        extend: Callable[[ReplicaRecord], ReplicaRecord] = lambda record: record,
        after_beat: Callable[[], Awaitable[None]] | None = None,
    ) -> None:  # fmt: skip
        self.failure: StaleLease | Unavailable | None = None
        self._registry = registry
        self._record = record
        self._loop = loop
        self._metrics = metrics
        self._interval_s = interval_s
        self._ttl_s = ttl_s
        self._max_step_s = max_step_s
        self._extend = extend
        self._after_beat = after_beat
        self._asking: asyncio.Future[tuple[EngineStats, int]] | None = None
        self._asked_s = 0.0  # on the monotonic clock
        self._task: asyncio.Task[None] | None = None
        self._has_changed = asyncio.Event()
        self._num_preemptions = 0

    async def start(self) -> None:
        """Reports now (so that the replica can be found at once) and from now on."""
        await self._beat()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def drain(self) -> None:
        """Asks for no more turns, while the ones that run go on."""
        self._record = replace(self._record, is_draining=True)
        await self._beat()

    async def report(self) -> None:
        """Reports now, and returns when it is known (or the store does not answer)."""
        await self._beat()

    async def stop(self) -> None:
        """Forgets the replica at once."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        try:
            await self._registry.deregister(self._record.role, self._record.replica_id, self._record.incarnation)
        except Unavailable:
            log.warning("not deregistered: the store does not answer; the registration ends by itself")

    def changed(self) -> None:
        """The replica's load is another now: the report comes early, so that nobody routes by the old one."""
        self._has_changed.set()

    async def _run(self) -> None:
        while self.failure is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._has_changed.wait()
            self._has_changed.clear()
            await self._beat()
            await asyncio.sleep(min(_MIN_INTERVAL_S, self._interval_s))

    async def _beat(self) -> None:
        await self._refresh()
        if self.failure is not None:
            return
        try:
            await self._registry.heartbeat(self._extend(self._record), self._ttl_s)
            if self._after_beat is not None:
                await self._after_beat()
        except StaleLease as error:
            self.failure = error
            log.error("a younger incarnation has taken this replica's place")
        except Unavailable:
            self._metrics.set("redis_up", 0.0)
        else:
            self._metrics.set("redis_up", 1.0)

    async def _refresh(self) -> None:
        """Takes in the engine's stats; those of the last time if it is in a step that takes longer than a beat."""
        if self._asking is None:
            self._asking, self._asked_s = asyncio.ensure_future(self._loop.call(_look)), time.monotonic()
        await asyncio.wait({self._asking}, timeout=self._interval_s / 2)
        if not self._asking.done():
            if time.monotonic() - self._asked_s > self._max_step_s:
                self.failure = Unavailable("the engine hangs in a step")
                log.error("the engine hangs in a step: this replica reports no more")
            return
        asked, self._asking = self._asking, None
        if asked.exception() is None:
            self._take_in(*asked.result())

    def _take_in(self, stats: EngineStats, num_quarantined: int) -> None:
        self._record = replace(
            self._record,
            num_free_blocks=stats.num_free_blocks,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_running_tokens=stats.num_running_tokens,
            num_waiting_tokens=stats.num_waiting_tokens,
            prefill_tokens_per_s=stats.prefill_tokens_per_s,
            decode_tokens_per_s=stats.decode_tokens_per_s,
            num_prefilled_tokens=stats.num_prefilled_tokens,
            num_evictable_blocks=stats.num_evictable_blocks,
        )
        metrics = self._metrics
        metrics.set("num_requests_running", stats.num_running)
        metrics.set("num_requests_waiting", stats.num_waiting)
        metrics.set("kv_cache_usage_perc", 1 - stats.num_free_blocks / stats.num_blocks)
        metrics.set("kv_blocks", stats.num_free_blocks, state="free")
        metrics.set("kv_blocks", num_quarantined, state="quarantined")
        metrics.set("kv_blocks", stats.num_blocks - stats.num_free_blocks - num_quarantined, state="used")
        metrics.increment("num_preemptions", stats.num_preemptions - self._num_preemptions)
        self._num_preemptions = stats.num_preemptions


def _look(engine: Engine) -> tuple[EngineStats, int]:
    return engine.stats(), engine.pool.num_quarantined_blocks
