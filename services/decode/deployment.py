"""The decode deployment: Serve places it and watches it; gateways speak to its own gRPC server.

Its handle carries what holds references to KV blocks (history for other replicas), and what is asked once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray.util
from ray import serve
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from services.common.errors import AntiphonError, Exhausted, Unavailable
from services.common.messages import ModelInfo
from services.common.settings import DecodeSettings, Settings
from services.common.telemetry import configure_logging
from services.decode.held_sessions import HeldSessions
from services.decode.server import DecodeServer
from services.decode.succession import Adoption, Estate, Heir, Prefix, choose_successor
from services.decode.turn import EngineFacts
from services.decode.worker import DecodeWorker
from services.replica.deployment import (
    HistoryHandle,
    next_item,
    pin_of,
    rdt_transfer,
    replica_call,
    replica_stream,
)
from services.replica.handover import (
    PING_S,
    HistoryOffer,
    HistoryRequest,
    PrefillLoad,
    PrefillRequest,
    PrefillResult,
)
from services.replica.runtime import ReplicaRuntime, new_identity
from services.sessions.registry import ReplicaRecord, ReplicaRegistry, Role
from services.transfer.base import Identity

log = logging.getLogger(__name__)

_DRAIN_S = 30.0
_HAND_OVER_S = 20.0
_CALL_S = 2.0  # of a call to another replica, besides its work
# While all prefill replicas are full or starting a call waits in Serve's queue; computing here is better then.
_ACCEPT_TIMEOUT_S = 2.0
_SILENCE_S = 5 * PING_S


@serve.deployment(
    name="decode",
    graceful_shutdown_timeout_s=_DRAIN_S + 30,
    health_check_timeout_s=60,
    request_router_config={"request_router_class": "services.replica.deployment:PinnedRouter"},
)
class DecodeDeployment:
    """Hosts a DecodeWorker and its DecodeServer. prefill: None if decode computes every prompt itself."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, prefill: DeploymentHandle[Any] | None = None
    ) -> None:
        replica = serve.get_replica_context().replica_id.unique_id
        identity = new_identity(Role.DECODE, replica)
        configure_logging(settings.telemetry.log_level, "decode", identity.replica_id)
        self._settings = settings
        runtime = self._runtime = await ReplicaRuntime.start(settings, Role.DECODE, identity, rdt_transfer(settings))
        engine = runtime.engine
        fleet = (
            None
            if prefill is None
            else PrefillHandle(prefill, runtime.registry, engine.layout.fingerprint, settings.sessions.registry_ttl_s)
        )
        held = HeldSessions(settings.autoscaling.session_keep_s, engine.pool.num_blocks * engine.layout.block_size)
        worker = self._worker = DecodeWorker(
            runtime.loop,
            runtime.exchange,
            EngineFacts.of(engine),
            settings=_decode_settings(settings),
            peers=HistoryHandle(lambda: serve.get_deployment_handle("decode"), settings.transfer.fetch_timeout_s),
            prefill=fleet,
            metrics=runtime.metrics,
            held=held,
            on_change=runtime.changed,
        )
        self._heir = Heir(runtime.loop, runtime.exchange, held, runtime.metrics)
        successors = SuccessorHandle(lambda: serve.get_deployment_handle("decode"), settings.transfer.fetch_timeout_s)
        self._estate = Estate(runtime.exchange, held, successors)
        host = _reachable_host(settings.decode)
        self._server = DecodeServer(worker, identity.incarnation, host, settings.decode.max_concurrent)
        await self._server.start()
        await runtime.register(
            self._server.address,
            fleet.refresh if fleet is not None else None,
            lambda record: replace(
                _with_sessions(record, held, self._heir), num_refused_blocks=worker.num_refused_blocks
            ),
        )

    async def history(self, request: HistoryRequest) -> AsyncIterator[HistoryOffer | AntiphonError]:
        """The blocks that are asked for, as far as they are held here; lent until the caller ends the stream."""
        transfer = self._settings.transfer
        try:
            async with self._worker.lending(request) as offer:
                yield offer
                if offer.ticket is not None:
                    await asyncio.sleep(transfer.lease_ttl_s + transfer.fetch_timeout_s)
        except AntiphonError as error:
            yield error

    async def inherit(self, successor: Identity, incarnations: tuple[str, ...]) -> bool:
        """See SuccessorClient. The registry knows of it when this returns."""
        is_meant = self._heir.inherit(successor, incarnations)
        if is_meant:
            await self._runtime.report()
        return is_meant

    async def num_held(self, prefix: Prefix) -> int:
        """See SuccessorClient."""
        return await self._heir.num_held(prefix)

    async def adopt(self, adoption: Adoption) -> bool:
        """See SuccessorClient."""
        return await self._heir.adopt(adoption)

    async def model_info(self) -> ModelInfo:
        """The model that is served."""
        engine, model = self._runtime.engine, self._settings.model
        return ModelInfo(
            name=model.served_name or Path(model.path).name,
            dtype=engine.dtype_name,
            cache_mode=engine.layout.cache_mode,
            max_seq_len=engine.max_seq_len,
            vocab_size=engine.config.vocab_size,
            block_size=engine.layout.block_size,
            num_layers=engine.layout.num_layers,
            kv_token_bytes=engine.layout.bytes_per_token,
            fingerprint=engine.model_fingerprint,
        )

    async def metrics_address(self) -> str:
        """host:port of this replica's /metrics."""
        return self._runtime.metrics_address

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine has ended."""
        self._runtime.check_health()

    async def __del__(self) -> None:
        """Drains: no new turns, running ones end within half a minute, idle sessions go to another replica."""
        if hasattr(self, "_server"):
            await self._runtime.drain()
            await self._server.stop(_DRAIN_S)
            await self._hand_over()
        if hasattr(self, "_runtime"):
            await self._runtime.stop()

    async def _hand_over(self) -> None:
        """Whatever fails here costs the sessions their KV, and not the replica its end."""
        runtime, identity = self._runtime, self._runtime.exchange.identity
        # Where all of them stop, the others have said so within a heartbeat.
        await asyncio.sleep(self._settings.sessions.heartbeat_s if self._estate.num_sessions else 0)
        try:
            records = await runtime.registry.list(Role.DECODE)
        except Unavailable:
            return
        successor = choose_successor(records, identity, runtime.engine.layout.fingerprint)
        if successor is None or not self._estate.num_sessions:
            return
        done = await self._estate.hand_over(successor, self._heir.inherits, _HAND_OVER_S)
        log.info("sessions handed over", extra={"details": asdict(done)})


class SuccessorHandle:
    """Implements SuccessorClient over the handle of the decode deployment (get_handle: called at the first use)."""

    def __init__(self, get_handle: Callable[[], DeploymentHandle[Any]], fetch_timeout_s: float) -> None:
        self._get_handle = get_handle
        self._fetch_timeout_s = fetch_timeout_s

    async def inherit(self, successor: Identity, incarnations: tuple[str, ...]) -> bool:
        """See SuccessorClient."""
        return bool(await self._call(_CALL_S, successor, "inherit", successor, incarnations))

    async def num_held(self, successor: Identity, prefix: Prefix) -> int:
        """See SuccessorClient."""
        return int(await self._call(_CALL_S, successor, "num_held", prefix))

    async def adopt(self, adoption: Adoption) -> bool:
        """See SuccessorClient."""
        timeout_s = _CALL_S + self._fetch_timeout_s
        return bool(await self._call(timeout_s, adoption.successor, "adopt", adoption))

    async def _call(self, timeout_s: float, successor: Identity, method: str, *args: object) -> Any:
        pin = pin_of(successor.replica_id)
        handle = self._get_handle().options(method_name=method, session_id=pin, _by_reference=True)
        response = handle.remote(*args)
        assert isinstance(response, DeploymentResponse)
        return await replica_call(response, timeout_s)


class PrefillHandle:
    """Implements PrefillClient over the handle of the prefill deployment; Serve picks the replica.

    lost_for_s: a replica that was lost may still be registered for so long.
    """

    def __init__(
        self, handle: DeploymentHandle[Any], registry: ReplicaRegistry, layout_fingerprint: str, lost_for_s: float
    ) -> None:
        self._handle = handle.options(stream=True, method_name="run", _by_reference=True)
        self._registry = registry
        self._layout = layout_fingerprint
        self._lost_for_s = lost_for_s
        self._load: PrefillLoad | None = None
        self._lost_until_s: list[float] = []  # a time a replica

    def load(self) -> PrefillLoad | None:
        """See PrefillClient; as of the last heartbeat, without those that have been lost since."""
        now_s = time.monotonic()
        self._lost_until_s = [each for each in self._lost_until_s if each > now_s]
        if self._load is None or self._load.num_replicas <= len(self._lost_until_s):
            return None
        return replace(self._load, num_replicas=self._load.num_replicas - len(self._lost_until_s))

    async def refresh(self) -> None:
        """Reads the registry. Raises Unavailable; what was known before stands then."""
        records = [each for each in await self._registry.list(Role.PREFILL) if each.layout_fingerprint == self._layout]
        able = [each for each in records if not each.is_draining]
        rates = [each.prefill_tokens_per_s for each in able if each.prefill_tokens_per_s is not None]
        self._load = None
        if able:
            waiting = min(each.num_waiting_tokens for each in able)
            self._load = PrefillLoad(len(able), waiting, sum(rates) / len(rates) if rates else None)

    @asynccontextmanager
    async def run(self, request: PrefillRequest) -> AsyncIterator[PrefillResult]:
        """See PrefillClient. Raises Exhausted if no replica takes the call soon."""
        async with replica_stream(self._handle, request) as responses:
            yield await self._result(responses)

    async def _result(self, responses: DeploymentResponseGenerator[Any]) -> PrefillResult:
        is_taken = False
        try:
            await next_item(responses, _ACCEPT_TIMEOUT_S)
            is_taken = True
            result: PrefillResult | None = None
            while result is None:
                result = await next_item(responses, _SILENCE_S)
        except Unavailable as error:
            # None takes the call in time: they are full or gone, all of them.
            is_late = not is_taken and isinstance(error.__cause__, TimeoutError)
            num_lost = self._load.num_replicas if is_late and self._load is not None else 1
            self._lost_until_s += [time.monotonic() + self._lost_for_s] * num_lost
            if is_late:
                raise Exhausted("no prefill replica takes calls now") from error
            raise
        return result


def _reachable_host(settings: DecodeSettings) -> str:
    """Only on the machine itself is known by which address the others reach it."""
    return str(ray.util.get_node_ip_address()) if settings.host == "node" else settings.host  # type: ignore[no-untyped-call]


def _with_sessions(record: ReplicaRecord, held: HeldSessions, heir: Heir) -> ReplicaRecord:
    # What the pool has evicted since is not worth keeping any more.
    num_blocks = min(held.num_blocks(record.block_size), record.num_evictable_blocks)
    num_sessions = len(held) if num_blocks else 0
    return replace(record, num_idle_sessions=num_sessions, num_session_blocks=num_blocks, inherits=heir.inherits)


def _decode_settings(settings: Settings) -> DecodeSettings:
    """Without prefix caching no turn may reuse what an earlier one has left."""
    reuses = settings.decode.reuse_history and settings.engine.prefix_caching
    return settings.decode.model_copy(update={"reuse_history": reuses})
