"""Prefill and decode workers in one process: the real workers, engines and transfers, with direct calls between them.

What goes wrong between replicas can be arranged: a call that is lost, a block that changes on its way, a transfer that
times out while it writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.common.errors import AntiphonError, TransferFailed, Unavailable
from services.common.sampling import SamplingParams
from services.common.settings import DecodeSettings, EngineSettings, ModelSettings
from services.common.telemetry import Metrics
from services.decode.held_sessions import HeldSessions
from services.decode.turn import Admitted, DecodeFinished, DecodeRequest, EngineFacts, HistoryHolder, TokenChunk
from services.decode.worker import DecodeWorker
from services.engine.engine import Engine, EngineRequest
from services.engine.loading import load_engine
from services.engine.loop import EngineLoop
from services.prefill.worker import PrefillWorker
from services.replica.exchange import BlockExchange
from services.replica.handover import HistoryOffer, HistoryRequest, PrefillLoad, PrefillRequest, PrefillResult
from services.transfer.base import Cause, Expected, FetchReport, Identity, KVTicket
from services.transfer.local import LocalHub, LocalTransfer

CHECKPOINT = Path(__file__).parents[1] / "data" / "checkpoints" / "v3"
BLOCK_SIZE = 16
SALT = b"tenant"
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


def tiny_engine(num_blocks: int = 64, **options: Any) -> Engine:
    """A small DeepSeek-V3 in float32."""
    settings = EngineSettings(
        device="cpu",
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_num_batched_tokens=64,
        max_num_sequences=8,
        num_threads=1,
        **options,
    )
    return load_engine(ModelSettings(path=str(CHECKPOINT), dtype="float32", max_seq_len=512), settings)


def prompt(seed: int, num_tokens: int) -> tuple[int, ...]:
    """Token ids that differ by seed from the first on."""
    return tuple((seed * 7919 + i * i * 31 + i * 17) % 500 + 5 for i in range(num_tokens))


class TroubledTransfer(LocalTransfer):
    """A LocalTransfer whose next `num_timeouts` fetches are given up while they may still write."""

    num_timeouts = 0

    async def fetch(
        self, ticket: KVTicket, into_block_ids: Sequence[int], *, expected: Expected, timeout_s: float | None = None
    ) -> FetchReport:
        """See base.Transfer."""
        report = await super().fetch(ticket, into_block_ids, expected=expected, timeout_s=timeout_s)
        if self.num_timeouts:
            self.num_timeouts -= 1
            raise TransferFailed(Cause.TIMEOUT, "given up", must_quarantine=True)
        return report


class Replica:
    """Engine, loop, transfer and exchange of one replica."""

    def __init__(self, hub: LocalHub, name: str, engine: Engine, quarantine_s: float) -> None:
        self.engine = engine
        self.loop = EngineLoop(engine)
        self.identity = Identity(name, f"{name}-1")
        model = engine.layout.fingerprint
        self.transfer = TroubledTransfer(hub, engine.kv_cache.pool, model=model, identity=self.identity)
        self.metrics = Metrics(name, "tiny")
        self.exchange = BlockExchange(
            self.loop,
            self.transfer,
            identity=self.identity,
            block_size=BLOCK_SIZE,
            quarantine_s=quarantine_s,
            metrics=self.metrics,
        )

    def count(self, stem: str, **labels: str) -> float:
        """A counter's value."""
        fixed = {"model_name": "tiny", "role": self.identity.replica_id}
        return self.metrics.registry.get_sample_value(f"antiphon_{stem}_total", fixed | labels) or 0.0

    async def num_held_blocks(self) -> int:
        """Blocks that are not free: held by anybody, or in quarantine. Checks the pool's books."""

        def look(engine: Engine) -> int:
            if engine.pool.num_free_blocks == engine.pool.num_blocks:
                engine.check_integrity()
            return engine.pool.num_blocks - engine.pool.num_free_blocks

        return await self.loop.call(look)

    async def until_idle(self) -> None:
        """Nothing is held, reserved or published any more."""
        async with asyncio.timeout(20):
            while await self.num_held_blocks() or self.engine.has_work or len(self.transfer.leases):
                await asyncio.sleep(0.005)
        assert self.engine.scheduler.num_reservations == 0


class DirectHistory:
    """HistoryClient without anything between the replicas. num_lost: calls that find nobody."""

    def __init__(self) -> None:
        self.workers: dict[str, DecodeWorker] = {}
        self.num_lost = 0
        self.requests: list[HistoryRequest] = []

    @asynccontextmanager
    async def history(self, request: HistoryRequest) -> AsyncIterator[HistoryOffer]:
        """See HistoryClient."""
        self.requests.append(request)
        if self.num_lost:
            self.num_lost -= 1
            raise Unavailable("lost")
        async with self.workers[request.holder.replica_id].lending(request) as offer:
            yield offer


class DirectPrefill:
    """PrefillClient without anything between the replicas. errors: raised by the next calls instead of an answer."""

    def __init__(self, worker: PrefillWorker, replica: Replica) -> None:
        self._worker = worker
        self._replica = replica
        self.errors: list[AntiphonError] = []
        self.damages_blocks = False
        self.num_calls = 0

    def load(self) -> PrefillLoad | None:
        """See PrefillClient."""
        return PrefillLoad(1, 0, None)

    @asynccontextmanager
    async def run(self, request: PrefillRequest) -> AsyncIterator[PrefillResult]:
        """See PrefillClient."""
        self.num_calls += 1
        if self.errors:
            raise self.errors.pop(0)
        async with self._worker.run(request) as result:
            if self.damages_blocks:
                lease = self._replica.transfer.leases.get(result.ticket.ticket_id)
                assert lease is not None
                self._replica.engine.kv_cache.pool[lease.block_ids[-1]] += 1
            yield result


class Group:
    """One prefill and two decode replicas, started."""

    def __init__(self, *, num_blocks: int = 64, quarantine_s: float = 0.2, **decode_settings: Any) -> None:
        hub = LocalHub()
        names = ("prefill-a", "decode-a", "decode-b")
        replicas = [Replica(hub, name, tiny_engine(num_blocks), quarantine_s) for name in names]
        self.replicas = replicas
        self.prefill_replica, self.first, self.second = replicas
        self.peers = DirectHistory()
        worker = PrefillWorker(self.prefill_replica.loop, self.prefill_replica.exchange, self.peers)
        self.prefill = DirectPrefill(worker, self.prefill_replica)
        settings = DecodeSettings(**{"remote_prefill": "always", **decode_settings})
        self.held = {each.identity.replica_id: HeldSessions(600.0, num_blocks * BLOCK_SIZE) for each in replicas[1:]}
        self.workers = self.peers.workers = {
            each.identity.replica_id: self._decode(each, settings) for each in replicas[1:]
        }

    def _decode(self, replica: Replica, settings: DecodeSettings) -> DecodeWorker:
        return DecodeWorker(
            replica.loop,
            replica.exchange,
            EngineFacts.of(replica.engine),
            settings=settings,
            peers=self.peers,
            prefill=self.prefill,
            metrics=replica.metrics,
            held=self.held[replica.identity.replica_id],
        )

    async def turn(self, request: DecodeRequest, replica: Replica | None = None) -> Reply:
        """A whole turn, at the first decode replica unless another one is given."""
        worker = self.workers[(replica or self.first).identity.replica_id]
        reply = Reply()
        async for event in worker.generate(request):
            if isinstance(event, TokenChunk):
                reply.chunks.append(event)
            elif isinstance(event, Admitted):
                reply.admitted = event
            else:
                reply.finished = event
        return reply

    async def until_idle(self) -> None:
        """No replica holds anything for anybody."""
        for replica in self.replicas:
            await replica.until_idle()


@asynccontextmanager
async def running_group(*, ends_idle: bool = True, **options: Any) -> AsyncIterator[Group]:
    """A Group; at the end nothing may be left of what the test did (unless ends_idle says otherwise)."""
    group = Group(**options)
    for replica in group.replicas:
        replica.loop.start()
    try:
        yield group
        if ends_idle:
            await group.until_idle()
    finally:
        for replica in group.replicas:
            await replica.exchange.close()
            await replica.loop.stop()


@dataclass
class Reply:
    """The events of a turn."""

    admitted: Admitted | None = None
    chunks: list[TokenChunk] = field(default_factory=list)
    finished: DecodeFinished | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token_id for chunk in self.chunks for token_id in chunk.token_ids)

    @property
    def end(self) -> DecodeFinished:
        assert self.finished is not None
        return self.finished

    @property
    def origins(self) -> list[tuple[str, str, int]]:
        return [(each.source.value, each.replica, each.num_tokens) for each in self.end.kv_origins]


def request(token_ids: Sequence[int], sampling: SamplingParams = GREEDY, **fields: Any) -> DecodeRequest:
    """A turn of one tenant."""
    return DecodeRequest("request", tuple(token_ids), sampling, SALT, **fields)


def held_by(replica: Replica, num_tokens: int) -> tuple[HistoryHolder, ...]:
    """The hint that a replica holds the first tokens."""
    return (HistoryHolder(replica.identity, num_tokens),)


def one_process(engine: Engine, token_ids: Sequence[int], sampling: SamplingParams = GREEDY, **fields: Any) -> Reply:
    """The same turn by an engine alone."""
    engine.add(EngineRequest("oracle", token_ids, sampling, **fields))
    reply = Reply()
    while engine.has_work:
        for output in engine.step():
            reply.chunks.append(TokenChunk(0, output.token_ids, output.logprobs, output.prompt_logprobs))
    return reply
