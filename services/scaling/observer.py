"""Keeps an eye on the registry of replicas, in a thread of its own: whoever decides must not wait for Redis."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from services.common.errors import Unavailable
from services.common.settings import SessionSettings
from services.sessions.connect import connect
from services.sessions.from_settings import keyspace_of, redis_settings
from services.sessions.registry import ReplicaRecord, ReplicaRegistry

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Observation:
    """The replicas that were alive at seen_s (monotonic)."""

    seen_s: float
    records: Sequence[ReplicaRecord]


class _Newest:
    """Shared by the observer and its thread, which must not keep the observer alive."""

    def __init__(self) -> None:
        self.observation: Observation | None = None
        self.is_over = threading.Event()


class RegistryObserver:
    """Reads the registry every interval_s from the first `latest` on, until it is closed or nobody has it any more.

    Raises InvalidSettings at once if the store cannot be named.
    """

    def __init__(self, settings: SessionSettings, interval_s: float) -> None:
        redis_settings(settings), keyspace_of(settings)
        self._settings = settings
        self._interval_s = interval_s
        self._newest = _Newest()
        self._thread: threading.Thread | None = None

    def latest(self) -> Observation | None:
        """The last that was seen; None before the first answer."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=_observe,
                args=(self._settings, self._interval_s, self._newest),
                name="scaling-observer",
                daemon=True,
            )
            self._thread.start()
            weakref.finalize(self, self._newest.is_over.set)
        return self._newest.observation

    def close(self) -> None:
        """Ends the thread."""
        self._newest.is_over.set()
        if self._thread is not None:
            self._thread.join()


def _observe(settings: SessionSettings, interval_s: float, newest: _Newest) -> None:
    asyncio.run(_observe_until_over(settings, interval_s, newest))


async def _observe_until_over(settings: SessionSettings, interval_s: float, newest: _Newest) -> None:
    client = connect(redis_settings(settings))
    registry = ReplicaRegistry(client, keyspace_of(settings))
    try:
        while not newest.is_over.is_set():
            try:
                records = await registry.list()
            except Unavailable:
                log.warning("the registry cannot be read: no replica is added or given up meanwhile")
            else:
                newest.observation = Observation(time.monotonic(), records)
            await asyncio.sleep(interval_s)
    finally:
        await client.aclose()
