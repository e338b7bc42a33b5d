"""The prefill deployment: Serve places it and routes to it; decode replicas call it through a handle."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from ray import serve

from services.common.errors import AntiphonError
from services.common.settings import Settings
from services.common.telemetry import configure_logging
from services.prefill.worker import PrefillWorker
from services.replica.deployment import HistoryHandle, rdt_transfer
from services.replica.handover import PING_S, PrefillRequest, PrefillResult
from services.replica.runtime import ReplicaRuntime, new_identity
from services.sessions.registry import Role


@serve.deployment(name="prefill", graceful_shutdown_timeout_s=60, health_check_timeout_s=60)
class PrefillDeployment:
    """Hosts a PrefillWorker."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        replica = serve.get_replica_context().replica_id.unique_id
        identity = new_identity(Role.PREFILL, replica)
        configure_logging(settings.telemetry.log_level, "prefill", identity.replica_id)
        self._settings = settings
        self._runtime = await ReplicaRuntime.start(settings, Role.PREFILL, identity, rdt_transfer(settings))
        if self._runtime.engine.kv_cache.pool.device.type == "cpu":
            os.nice(settings.prefill.nice)
        # Decode is bound with prefill, so its handle can only be had once both are there.
        peers = HistoryHandle(lambda: serve.get_deployment_handle("decode"), settings.transfer.fetch_timeout_s)
        self._worker = PrefillWorker(self._runtime.loop, self._runtime.exchange, peers)
        await self._runtime.register()

    async def run(self, request: PrefillRequest) -> AsyncIterator[PrefillResult | AntiphonError | None]:
        """None at once (the call has been taken) and every second while it is computed; then the result, or why there
        is none.

        The stream stays open until the caller ends it, which returns the blocks, so that a replica that drains waits
        for its readers; or until no read can begin any more.
        """
        yield None
        transfer = self._settings.transfer
        try:
            async with AsyncExitStack() as stack:
                computing = asyncio.ensure_future(stack.enter_async_context(self._worker.run(request)))
                try:
                    while not (await asyncio.wait({computing}, timeout=PING_S))[0]:
                        yield None
                    result = computing.result()
                finally:
                    if computing.cancel():  # the caller has left
                        await asyncio.wait({computing})
                yield result
                await asyncio.sleep(transfer.lease_ttl_s + transfer.fetch_timeout_s)
        except AntiphonError as error:
            yield error

    async def metrics_address(self) -> str:
        """host:port of this replica's /metrics."""
        return self._runtime.metrics_address

    async def check_integrity(self) -> None:
        """Raises AssertionError if a block is neither free nor anybody's, for tests of an idle replica."""
        await self._runtime.loop.call(lambda engine: engine.check_integrity())

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine has ended."""
        self._runtime.check_health()

    async def __del__(self) -> None:
        """Serve has waited for running calls."""
        if hasattr(self, "_runtime"):
            await self._runtime.stop()
