"""What a prefill or decode replica runs besides its worker: engine, transfer, registration, metrics."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from services.common.settings import Settings
from services.common.telemetry import Metrics, MetricsServer
from services.engine.engine import Engine
from services.engine.hub import resolve_model
from services.engine.loading import load_engine
from services.engine.loop import EngineLoop
from services.replica.exchange import BlockExchange
from services.replica.heartbeat import Heartbeat
from services.sessions.connect import connect
from services.sessions.from_settings import keyspace_of, redis_settings
from services.sessions.registry import ReplicaRecord, ReplicaRegistry, Role
from services.text.tokenizer import Tokenizer
from services.transfer.base import Identity, Transfer

MakeTransfer = Callable[[Engine, Identity], Awaitable[Transfer]]


def new_identity(role: Role, serve_replica_id: str) -> Identity:
    """A replica's name in the registry and its incarnation; serve_replica_id_of finds the way back."""
    return Identity(f"{role.value}-{serve_replica_id}", uuid.uuid4().hex)


def serve_replica_id_of(replica_id: str) -> str:
    """What Serve calls the replica."""
    return replica_id.partition("-")[2]


class ReplicaRuntime:
    """The parts of one replica, running. Made by `start`; `register` makes it known, `stop` ends all.

    engine: to read what does not change; all else goes through `loop`.
    """

    def __init__(
        self, settings: Settings, role: Role, engine: Engine, loop: EngineLoop, exchange: BlockExchange,
        metrics: Metrics, metrics_port: int, registry: ReplicaRegistry, stack: AsyncExitStack,
    ) -> None:  # fmt: skip
        self.engine = engine
        self.loop = loop
        self.exchange = exchange
        self.metrics = metrics
        self.registry = registry
        self._settings = settings
        self._role = role
        self._started_at_s = time.time()
        self._metrics_port = metrics_port
        self._stack = stack
        self._heartbeat: Heartbeat | None = None

    @classmethod
    async def start(
        cls, settings: Settings, role: Role, identity: Identity, make_transfer: MakeTransfer
    ) -> ReplicaRuntime:
        """Loads the model and starts the engine. Raises InvalidCheckpoint, UnsupportedConfig, InvalidSettings."""
        async with AsyncExitStack() as stack:
            redis = connect(redis_settings(settings.sessions))
            stack.push_async_callback(redis.aclose)
            registry = ReplicaRegistry(redis, keyspace_of(settings.sessions))
            metrics = Metrics(role.value, settings.model.served_name or Path(settings.model.path).name)
            telemetry = settings.telemetry
            metrics_server = MetricsServer(metrics, telemetry.metrics_host, telemetry.replica_metrics_port)
            stack.callback(metrics_server.close)
            engine = await asyncio.to_thread(_load, settings)
            loop = EngineLoop(engine)
            loop.start()
            stack.push_async_callback(loop.stop)
            exchange = BlockExchange(
                loop,
                await make_transfer(engine, identity),
                identity=identity,
                block_size=engine.layout.block_size,
                quarantine_s=settings.transfer.quarantine_s,
                metrics=metrics,
            )
            stack.push_async_callback(exchange.close)
            return cls(settings, role, engine, loop, exchange, metrics, metrics_server.port, registry, stack.pop_all())

    async def register(
        self,
        address: str = "",
        after_beat: Callable[[], Awaitable[None]] | None = None,
        extend: Callable[[ReplicaRecord], ReplicaRecord] = lambda record: record,
    ) -> None:
        """Makes the replica known, and keeps its record current.

        address: of its gRPC server. extend: adds what only the caller knows.
        """
        engine, identity, sessions = self.engine, self.exchange.identity, self._settings.sessions
        record = ReplicaRecord(
            role=self._role,
            replica_id=identity.replica_id,
            incarnation=identity.incarnation,
            started_at_s=self._started_at_s,
            model_fingerprint=engine.model_fingerprint,
            layout_fingerprint=engine.layout.fingerprint,
            block_size=engine.layout.block_size,
            num_blocks=engine.pool.num_blocks,
            num_free_blocks=engine.pool.num_free_blocks,
            address=address,
            serve_replica_id=serve_replica_id_of(identity.replica_id),
            block_bytes=engine.layout.bytes_per_token * engine.layout.block_size,
        )
        self._heartbeat = Heartbeat(
            self.registry,
            record,
            self.loop,
            self.metrics,
            interval_s=sessions.heartbeat_s,
            ttl_s=sessions.registry_ttl_s,
            max_step_s=self._settings.engine.max_step_s,
            extend=lambda each: extend(replace(each, transfer_bytes_per_s=self.exchange.transfer_bytes_per_s)),
            after_beat=after_beat,
        )
        await self._heartbeat.start()

    def changed(self) -> None:
        """The load is another now: the registry hears of it early."""
        if self._heartbeat is not None:
            self._heartbeat.changed()

    async def report(self) -> None:
        """The registry hears of a change before this returns."""
        if self._heartbeat is not None:
            await self._heartbeat.report()

    @property
    def metrics_address(self) -> str:
        """host:port of /metrics."""
        return f"{self._settings.telemetry.metrics_host}:{self._metrics_port}"

    def check_health(self) -> None:
        """Raises what has ended the engine, or StaleLease if another process has this replica's place."""
        if self.loop.failure is not None:
            raise self.loop.failure
        if self._heartbeat is not None and self._heartbeat.failure is not None:
            raise self._heartbeat.failure

    async def drain(self) -> None:
        """Says that no more work is wanted."""
        if self._heartbeat is not None:
            await self._heartbeat.drain()

    async def stop(self) -> None:
        """Deregisters, gives all blocks back, ends the engine."""
        if self._heartbeat is not None:
            await self._heartbeat.stop()
        await self._stack.aclose()


def _load(settings: Settings) -> Engine:
    # What a transfer brings has to be found again, so the pool always keeps prefixes; a turn that shall reuse none
    # gets a salt of its own.
    engine_settings = settings.engine.model_copy(update={"prefix_caching": True})
    folder = resolve_model(settings.model.path)
    eos = Tokenizer.from_folder(folder).eos_token_ids if (folder / "tokenizer.json").exists() else ()
    return load_engine(settings.model, engine_settings, tuple(eos))
