"""Runs turns on one engine: reserve blocks, obtain the KV that is missing, stream tokens.

Whatever fails between replicas ends in computing here: it costs time, never a wrong token.
"""

from __future__ import annotations

import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager

from services.common.errors import InvalidRequest, OutOfBlocks, PromptTooLong, QueueFull, StaleLease
from services.common.sampling import FinishReason
from services.common.settings import DecodeSettings
from services.common.telemetry import Metrics
from services.decode.held_sessions import HeldSessions
from services.decode.obtain import Obtainer
from services.decode.turn import (
    Admitted,
    DecodeEvent,
    DecodeFinished,
    DecodeRequest,
    EngineFacts,
    TokenChunk,
    Turn,
    TurnRecord,
)
from services.engine.engine import Engine, EngineRequest, EngineStats
from services.engine.loop import EngineLoop
from services.engine.scheduler import Reservation
from services.replica.exchange import BlockExchange
from services.replica.handover import HistoryClient, HistoryOffer, HistoryRequest, PrefillClient

_MAX_FENCES = 100_000


class DecodeWorker:
    """One engine that answers turns.

    peers: reaches replicas that hold history; prefill: None without such replicas. held: is told which sessions' KV
    stays here. on_change: called when a turn has come or gone.
    """

    def __init__(
        self,
        loop: EngineLoop,
        exchange: BlockExchange,
        facts: EngineFacts,
        *,
        settings: DecodeSettings,
        peers: HistoryClient,
        prefill: PrefillClient | None,
        metrics: Metrics,
        held: HeldSessions,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._held = held
        self._on_change = on_change
        self._loop = loop
        self._exchange = exchange
        self._facts = facts
        self._settings = settings
        self._metrics = metrics
        self._obtainer = Obtainer(exchange, facts.bytes_per_token, settings, peers, prefill)
        self._fences: OrderedDict[str, int] = OrderedDict()
        self._turns: dict[str, Turn] = {}  # those that can be stopped, by call_id
        self.num_refused_blocks = 0  # that turns which were refused for want of blocks would have taken

    async def generate(self, request: DecodeRequest) -> AsyncGenerator[DecodeEvent]:
        """Admitted, then chunks, then finished. Closing it, or cancelling it, ends the turn and frees all it holds.

        Raises StaleLease, InvalidRequest, PromptTooLong, OutOfBlocks and QueueFull before any work, NumericsError and
        Unavailable (the engine has stopped) later.
        """
        self._check(request)
        # Without reuse a salt of its own keeps a turn from finding anything, also where its prompt is handed over.
        salt = request.salt if self._settings.reuse_history else request.salt + uuid.uuid4().bytes
        turn = Turn(request, TurnRecord(request, self._exchange.identity.replica_id), salt)
        if request.call_id:
            self._turns[request.call_id] = turn
        try:
            stats = await self._admit(turn)
            self._on_change()
            reservation = turn.reservation
            turn.record.admitted(reservation.num_cached_tokens if reservation else 0)
            yield Admitted(turn.record.num_local_tokens, len(reservation.block_table) if reservation else 0)
            async with aclosing(self._obtainer.obtain(turn, stats)) as chunks:
                async for chunk in chunks:
                    yield chunk
            async with aclosing(self._decode(turn)) as events:
                async for event in events:
                    yield event
        finally:
            self._turns.pop(request.call_id, None)
            if turn.reservation is not None:
                self._exchange.give_back(turn.reservation)
            self._note_held(turn)
            self._on_change()

    def stop(self, call_id: str) -> None:
        """The caller has found the end of this reply: it ends with the next step, and says how it went."""
        if turn := self._turns.get(call_id):
            turn.is_stopped = True

    async def forget(self, session_digest: str, token_ids: Sequence[int], salt: bytes) -> int:
        """A session was deleted: blocks with its KV that nobody uses now are evicted first; how many there are."""
        self._held.ended(session_digest, (), salt)
        return await self._loop.call(lambda engine: engine.evict_first(token_ids, salt))

    @asynccontextmanager
    async def lending(self, request: HistoryRequest) -> AsyncIterator[HistoryOffer]:
        """What another replica wants, as far as it is held here, until the context ends. Raises TransferFailed.

        What a session that moves leaves behind is evicted first: it would push out the only copies of others.
        """
        is_lent = False
        try:
            async with self._exchange.offering(request) as offer:
                is_lent = offer.ticket is not None
                yield offer
        finally:
            if is_lent and request.moved_session:
                self._held.ended(request.moved_session, (), request.salt)
                self._exchange.soon(lambda engine: engine.evict_first(request.token_ids, request.salt))

    # Before any work.

    def _check(self, request: DecodeRequest) -> None:
        if request.session_digest:
            newest = self._fences.pop(request.session_digest, 0)
            self._fences[request.session_digest] = max(newest, request.fence)
            if len(self._fences) > _MAX_FENCES:
                self._fences.popitem(last=False)
            if request.fence < newest:
                self._metrics.increment("fence_rejections")
                raise StaleLease(f"fence {request.fence} has been overtaken by {newest}")
        max_tokens = request.sampling.max_tokens
        if max_tokens is not None and len(request.resumed_token_ids) >= max_tokens:
            raise InvalidRequest("num_resumed_tokens", "the reply has all its tokens already")

    async def _admit(self, turn: Turn) -> EngineStats:
        """Reserves the blocks. Raises as `generate` does before any work."""
        request, facts = turn.request, self._facts
        num_tokens = len(request.token_ids)
        if num_tokens >= facts.max_seq_len:
            raise PromptTooLong("prompt", f"{num_tokens} tokens; fewer than {facts.max_seq_len} can be served")

        def take(engine: Engine) -> tuple[Reservation | None, EngineStats]:
            stats = engine.stats()
            if stats.num_waiting >= facts.max_num_waiting:
                raise QueueFull(f"{stats.num_waiting} sequences are waiting already")
            # For the prompt's logprobs every token is computed here, in the engine's own blocks.
            wants_all = request.sampling.prompt_logprobs is not None
            return None if wants_all else engine.reserve(request.token_ids, turn.salt), stats

        try:
            turn.reservation, stats = await self._exchange.take(take, _undo)
        except OutOfBlocks:
            self.num_refused_blocks += -(-num_tokens // self._exchange.block_size)
            self._on_change()
            raise
        return stats

    # Tokens.

    async def _decode(self, turn: Turn) -> AsyncGenerator[TokenChunk | DecodeFinished]:
        request, record = turn.request, turn.record
        prefilled = record.prefilled
        is_stop = turn.is_stopped or (prefilled is not None and prefilled.is_stop)
        if is_stop or (prefilled is not None and record.length_reached(self._facts.max_seq_len)):
            yield self._finished(turn, FinishReason.STOP if is_stop else FinishReason.LENGTH)
            return
        engine_request = EngineRequest(
            request_id=f"{request.request_id}/{uuid.uuid4().hex}",  # a turn may come again while its last try ends
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            tenant_salt=turn.salt,
            resumed_token_ids=request.resumed_token_ids + record.next_token_ids,
        )
        started_s, is_computed = time.perf_counter(), False
        async with aclosing(self._loop.generate(engine_request, turn.reservation)) as outputs:
            async for output in outputs:
                if output.error is not None:
                    raise output.error
                if output.token_ids:
                    chunk = record.output(output, started_s)
                    if not is_computed:
                        is_computed = True
                        self._on_change()  # its prompt waits no longer
                    yield chunk
                if output.finish_reason is not None or turn.is_stopped:
                    yield self._finished(turn, output.finish_reason or FinishReason.STOP)
                    return

    def _num_findable(self, turn: Turn) -> int:
        """Leading tokens of prompt and reply that stay findable here: full blocks, and the last token has no KV yet."""
        size = self._exchange.block_size
        num_computed = len(turn.request.prompt_token_ids) + turn.record.num_generated_tokens - 1
        return num_computed // size * size if self._settings.reuse_history else 0

    def _note_held(self, turn: Turn) -> None:
        """However the turn has ended: a client that has enough of a reply may come again too."""
        request, record = turn.request, turn.record
        if request.session_digest and record.has_first_token:
            token_ids = (*request.token_ids, *record.new_token_ids)[: self._num_findable(turn)]
            self._held.ended(request.session_digest, token_ids, turn.salt)

    def _finished(self, turn: Turn, reason: FinishReason) -> DecodeFinished:
        finished = turn.record.finished(reason, self._num_findable(turn))
        self._count(finished)
        self._on_change()  # before the caller hears of it and comes again
        return finished

    def _count(self, finished: DecodeFinished) -> None:
        metrics, usage, timings = self._metrics, finished.usage, finished.timings
        metrics.observe("request_queue_time_seconds", timings.queue_ms / 1e3)
        metrics.observe("request_prefill_time_seconds", timings.prefill_ms / 1e3)
        metrics.observe("request_decode_time_seconds", timings.decode_ms / 1e3)
        metrics.increment("prompt_tokens", usage.num_prompt_tokens)
        metrics.increment("generation_tokens", usage.num_generated_tokens)
        metrics.increment("prefix_cache_queries", usage.num_prompt_tokens)
        metrics.increment("prefix_cache_hits", usage.num_cached_tokens)


def _undo(engine: Engine, taken: tuple[Reservation | None, EngineStats]) -> None:
    if taken[0] is not None:
        engine.cancel(taken[0])
