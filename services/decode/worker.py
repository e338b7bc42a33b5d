"""Runs turns on one engine: reserve blocks, obtain the KV that is missing, stream tokens.

Whatever fails between replicas ends in computing here: it costs time, never a wrong token.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from services.common.errors import (
    AntiphonError,
    InvalidRequest,
    OutOfBlocks,
    PromptTooLong,
    QueueFull,
    StaleLease,
    TransferFailed,
    Unavailable,
)
from services.common.messages import FinishReason, PrefillPlace
from services.common.settings import DecodeSettings
from services.common.telemetry import Metrics
from services.decode.plan import Plan, Situation, plan, replan
from services.decode.turn import Admitted, DecodeEvent, DecodeFinished, DecodeRequest, TokenChunk, TurnRecord
from services.engine.engine import Engine, EngineRequest, EngineStats
from services.engine.loop import EngineLoop
from services.engine.scheduler import Reservation
from services.replica.averages import MovingAverage
from services.replica.exchange import BlockExchange
from services.replica.handover import HistoryClient, PrefillClient, PrefillRequest, PrefillResult, blocks_between

log = logging.getLogger(__name__)

_MAX_FENCES = 100_000


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What does not change about an engine. max_seq_len: most tokens of prompt and reply that its pool can hold."""

    max_seq_len: int
    max_num_waiting: int
    bytes_per_token: int

    @classmethod
    def of(cls, engine: Engine) -> EngineFacts:
        """Read between steps, or before the first."""
        config = engine.scheduler.config
        return cls(engine.max_seq_len, config.max_num_waiting, engine.layout.bytes_per_token)


@dataclass(slots=True)
class _Turn:
    """A turn while it runs. reservation: None where the engine's own queue has to find the blocks."""

    request: DecodeRequest
    record: TurnRecord
    salt: bytes
    reservation: Reservation | None = None


class DecodeWorker:
    """One engine that answers turns. peers: reaches replicas that hold history; prefill: None without such replicas.

    reuses_history: False computes every turn from its first token.
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
    ) -> None:
        self._loop = loop
        self._exchange = exchange
        self._facts = facts
        self._settings = settings
        self._peers = peers
        self._prefill = prefill
        self._metrics = metrics
        self._handover_ms = MovingAverage()
        self._fences: OrderedDict[str, int] = OrderedDict()
        self.num_turns = 0

    async def generate(self, request: DecodeRequest) -> AsyncGenerator[DecodeEvent]:
        """Admitted, then chunks, then finished. Closing it, or cancelling it, ends the turn and frees all it holds.

        Raises StaleLease, InvalidRequest, PromptTooLong, OutOfBlocks and QueueFull before any work, NumericsError and
        Unavailable (the engine has stopped) later.
        """
        self._check(request)
        # Without reuse a salt of its own keeps a turn from finding anything, also where its prompt is handed over.
        salt = request.salt if self._settings.reuse_history else request.salt + uuid.uuid4().bytes
        turn = _Turn(request, TurnRecord(request, self._exchange.identity.replica_id), salt)
        self.num_turns += 1
        try:
            stats = await self._admit(turn)
            reservation = turn.reservation
            turn.record.admitted(reservation.num_cached_tokens if reservation else 0)
            yield Admitted(turn.record.num_local_tokens, len(reservation.block_table) if reservation else 0)
            await self._obtain_history(turn, self._situation(turn, stats))
            async with aclosing(self._prefill_elsewhere(turn)) as chunks:
                async for chunk in chunks:
                    yield chunk
            async with aclosing(self._decode(turn)) as events:
                async for event in events:
                    yield event
        finally:
            self.num_turns -= 1
            if turn.reservation is not None:
                self._exchange.give_back(turn.reservation)

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

    async def _admit(self, turn: _Turn) -> EngineStats:
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

        turn.reservation, stats = await self._exchange.take(take, _undo)
        return stats

    # The KV that is missing.

    def _situation(self, turn: _Turn, stats: EngineStats) -> Situation:
        size = self._exchange.block_size
        num_tokens = len(turn.request.token_ids)
        held = [holder.num_computed_tokens for holder in turn.request.holders] if self._settings.reuse_history else []
        return Situation(
            num_tokens=num_tokens,
            num_local_tokens=turn.record.num_local_tokens,
            # One token at least is computed, and only full blocks can be found.
            num_remote_tokens=min(max(held, default=0), num_tokens - 1) // size * size,
            bytes_per_token=self._facts.bytes_per_token,
            num_running=stats.num_running,
            num_waiting_tokens=stats.num_waiting_tokens,
            prefill_tokens_per_s=stats.prefill_tokens_per_s,
            transfer_bytes_per_s=self._exchange.transfer_bytes_per_s,
            handover_ms=self._handover_ms.value,
            prefill=self._prefill.load() if self._prefill is not None else None,
        )

    async def _obtain_history(self, turn: _Turn, situation: Situation) -> None:
        """Fetches history if that is cheaper than computing it, and settles where the rest is computed."""
        if turn.reservation is None:
            turn.record.reason = "the prompt's logprobs are wanted, so this replica computes all of it"
            return
        mode = self._settings.remote_prefill
        decision = plan(situation, mode)
        if decision.fetches_history:
            await self._fetch_history(turn, situation.num_remote_tokens)
            num_held = turn.reservation.num_computed_tokens if turn.reservation is not None else 0
            decision = replan(situation, num_held, mode, fetches_history=True)
        self._settle(turn, decision)

    def _settle(self, turn: _Turn, decision: Plan) -> None:
        turn.record.reason = decision.reason
        if turn.reservation is None:
            turn.record.reason = "a transfer of history failed and no blocks are free to receive another one"
        elif self._prefill is not None:
            turn.record.place = decision.place

    async def _fetch_history(self, turn: _Turn, num_tokens: int) -> None:
        reservation = turn.reservation
        assert reservation is not None
        holder = max(turn.request.holders, key=lambda each: each.num_computed_tokens)
        try:
            report = await self._exchange.fetch_history(
                self._peers, reservation, holder.identity, num_tokens, turn.salt
            )
        except (TransferFailed, Unavailable) as error:
            self._warn(turn, "history was not fetched", error)
            await self._replace_reservation(turn)
            return
        if report is not None:
            turn.record.fetched(report)
            turn.record.fetched_from = holder.identity.replica_id
            turn.record.num_fetched_tokens = reservation.num_computed_tokens - reservation.num_cached_tokens

    async def _prefill_elsewhere(self, turn: _Turn) -> AsyncGenerator[TokenChunk]:
        """Lets a prefill replica compute the prompt, if that is the plan: one chunk, with the first token.

        A replica that is lost is replaced once; on any other trouble the prompt is computed here.
        """
        record = turn.record
        if record.place is not PrefillPlace.PREFILL or self._prefill is None:
            return
        for tries_left in (1, 0):
            try:
                started_s = time.perf_counter()
                async with self._prefill.run(self._prefill_request(turn)) as result:
                    handover_ms = (time.perf_counter() - started_s) * 1e3 - result.prefill_ms - result.transfer_ms
                    self._handover_ms.record(max(handover_ms, 0.0))
                    # The token is right whatever becomes of the blocks, so it need not wait for them.
                    yield record.prefill_result(result)
                    await self._receive(turn, result)
            except AntiphonError as error:
                if record.prefilled is not None:
                    return  # the token is there; what failed was letting go
                self._warn(turn, "a prefill replica did not compute the prompt", error)
                if not (isinstance(error, Unavailable) and tries_left):
                    record.place = PrefillPlace.DECODE
                    record.reason = f"a prefill replica was asked and failed ({error.reason})"
                    return
            else:
                return

    def _prefill_request(self, turn: _Turn) -> PrefillRequest:
        request, reservation = turn.request, turn.reservation
        assert reservation is not None
        held, size = reservation.num_computed_tokens, self._exchange.block_size
        return PrefillRequest(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            resumed_token_ids=request.resumed_token_ids,
            salt=turn.salt,
            sampling=request.sampling,
            holder=self._exchange.identity,
            num_held_tokens=held,
            into_block_ids=blocks_between(reservation.block_table, held, len(reservation.token_ids), size),
        )

    async def _receive(self, turn: _Turn, result: PrefillResult) -> None:
        """Fetches the blocks of the prompt; without them it is computed here once more."""
        reservation, record = turn.reservation, turn.record
        assert reservation is not None
        first = reservation.num_computed_tokens
        num_tokens = len(reservation.token_ids) - first
        try:
            report = await self._exchange.fetch(reservation, result.ticket, first, num_tokens, result.replica)
        except TransferFailed as error:
            self._warn(turn, "the computed prompt did not arrive", error)
            record.place = PrefillPlace.DECODE
            record.reason = f"a prefill replica computed it, but its blocks did not arrive ({error.cause})"
            await self._replace_reservation(turn)
        else:
            record.fetched(report)
            record.has_prefilled_blocks = True

    async def _replace_reservation(self, turn: _Turn) -> None:
        """After a failed transfer: other blocks, if those reserved are in quarantine; none if none are free."""
        if turn.reservation is None or turn.reservation.is_open:
            return
        turn.reservation = None
        try:
            turn.reservation = await self._exchange.reserve(turn.request.token_ids, turn.salt)
        except OutOfBlocks as error:
            self._warn(turn, "no blocks to replace those in quarantine", error)

    # Tokens.

    async def _decode(self, turn: _Turn) -> AsyncGenerator[TokenChunk | DecodeFinished]:
        request, record = turn.request, turn.record
        prefilled = record.prefilled
        if prefilled is not None and (prefilled.is_stop or record.length_reached(self._facts.max_seq_len)):
            yield self._finished(turn, FinishReason.STOP if prefilled.is_stop else FinishReason.LENGTH)
            return
        engine_request = EngineRequest(
            request_id=f"{request.request_id}/{uuid.uuid4().hex}",  # a turn may come again while its last try ends
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            tenant_salt=turn.salt,
            resumed_token_ids=request.resumed_token_ids + record.next_token_ids,
        )
        started_s = time.perf_counter()
        async with aclosing(self._loop.generate(engine_request, turn.reservation)) as outputs:
            async for output in outputs:
                if output.error is not None:
                    raise output.error
                if output.token_ids:
                    yield record.output(output, started_s)
                if output.finish_reason is not None:
                    yield self._finished(turn, output.finish_reason)

    def _finished(self, turn: _Turn, reason: FinishReason) -> DecodeFinished:
        record, size = turn.record, self._exchange.block_size
        num_computed = len(turn.request.prompt_token_ids) + record.num_generated_tokens - 1
        num_findable = num_computed // size * size if self._settings.reuse_history else 0
        finished = record.finished(reason, num_findable)
        self._count(finished)
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

    def _warn(self, turn: _Turn, event: str, error: AntiphonError) -> None:
        request = turn.request
        fields = {"request_id": request.request_id, "session": request.session_digest, "turn": request.turn}
        log.warning(event, extra={**fields, "reason": error.reason})


def _undo(engine: Engine, taken: tuple[Reservation | None, EngineStats]) -> None:
    if taken[0] is not None:
        engine.cancel(taken[0])
