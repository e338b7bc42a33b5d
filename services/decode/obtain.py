"""Obtains the KV that a turn's prompt lacks: history from who holds it, the rest from a prefill replica or not at all.

Whatever fails between replicas leaves the rest to be computed here: it costs time, never a wrong token.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from services.common.errors import AntiphonError, OutOfBlocks, TransferFailed, Unavailable
from services.common.messages import PrefillPlace
from services.common.settings import DecodeSettings
from services.decode.plan import Plan, Situation, plan, replan
from services.decode.turn import TokenChunk, Turn
from services.engine.engine import EngineStats
from services.replica.exchange import BlockExchange
from services.replica.handover import HistoryClient, PrefillClient, PrefillRequest, PrefillResult, blocks_between
from services.replica.measured import Measured

log = logging.getLogger(__name__)


class Obtainer:
    """Of one decode replica. prefill: None without prefill replicas."""

    def __init__(
        self,
        exchange: BlockExchange,
        bytes_per_token: int,
        settings: DecodeSettings,
        peers: HistoryClient,
        prefill: PrefillClient | None,
    ) -> None:
        self._exchange = exchange
        self._bytes_per_token = bytes_per_token
        self._settings = settings
        self._peers = peers
        self._prefill = prefill
        self._handover_ms = Measured()

    async def obtain(self, turn: Turn, stats: EngineStats) -> AsyncGenerator[TokenChunk]:
        """Fills the turn's reservation as far as others can; one chunk if one of them sampled the first token."""
        await self._obtain_history(turn, self._situation(turn, stats))
        if turn.record.place is PrefillPlace.PREFILL and self._prefill is not None:
            async with aclosing(self._prefill_elsewhere(turn, self._prefill)) as chunks:
                async for chunk in chunks:
                    yield chunk

    def _situation(self, turn: Turn, stats: EngineStats) -> Situation:
        size = self._exchange.block_size
        num_tokens = len(turn.request.token_ids)
        may_fetch = self._settings.reuse_history and self._settings.fetch_history
        held = [holder.num_computed_tokens for holder in turn.request.holders] if may_fetch else []
        return Situation(
            num_tokens=num_tokens,
            num_local_tokens=turn.record.num_local_tokens,
            # One token at least is computed, and only full blocks can be found.
            num_remote_tokens=min(max(held, default=0), num_tokens - 1) // size * size,
            bytes_per_token=self._bytes_per_token,
            num_running=stats.num_running,
            num_waiting_tokens=stats.num_waiting_tokens,
            prefill_tokens_per_s=stats.prefill_tokens_per_s,
            transfer_bytes_per_s=self._exchange.transfer_bytes_per_s,
            handover_ms=self._handover_ms.value,
            prefill=self._prefill.load() if self._prefill is not None else None,
        )

    async def _obtain_history(self, turn: Turn, situation: Situation) -> None:
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

    def _settle(self, turn: Turn, decision: Plan) -> None:
        turn.record.reason = decision.reason
        if turn.reservation is None:
            turn.record.reason = "a transfer of history failed and no blocks are free to receive another one"
        elif self._prefill is not None:
            turn.record.place = decision.place

    async def _fetch_history(self, turn: Turn, num_tokens: int) -> None:
        reservation = turn.reservation
        assert reservation is not None
        holder = max(turn.request.holders, key=lambda each: each.num_computed_tokens)
        session = turn.request.session_digest
        try:
            report = await self._exchange.fetch_history(
                self._peers, reservation, holder.identity, num_tokens, turn.salt, moved_session=session
            )
        except (TransferFailed, Unavailable) as error:
            self._warn(turn, "history was not fetched", error)
            await self._replace_reservation(turn)
            return
        if report is not None:
            turn.record.fetched(report)
            turn.record.fetched_from = holder.identity.replica_id
            turn.record.num_fetched_tokens = reservation.num_computed_tokens - reservation.num_cached_tokens

    async def _prefill_elsewhere(self, turn: Turn, prefill: PrefillClient) -> AsyncGenerator[TokenChunk]:
        """Lets a prefill replica compute the prompt: one chunk, with the first token.

        A replica that is lost is replaced once; on any other trouble the prompt is computed here.
        """
        record = turn.record
        for tries_left in (1, 0):
            try:
                started_s = time.perf_counter()
                async with prefill.run(self._prefill_request(turn)) as result:
                    handover_ms = (time.perf_counter() - started_s) * 1e3 - result.prefill_ms - result.transfer_ms
                    self._handover_ms.record(max(handover_ms, 0.0))
                    # The token is right whatever becomes of the blocks, so it need not wait for them.
                    yield record.prefill_result(result)
                    await self._receive(turn, result)
            except AntiphonError as error:
                if record.prefilled is not None:
                    return  # the token is there; what failed was letting go
                self._warn(turn, "a prefill replica did not compute the prompt", error)
                if not (isinstance(error, Unavailable) and tries_left and prefill.load() is not None):
                    record.place = PrefillPlace.DECODE
                    record.reason = f"a prefill replica was asked and failed ({error.reason})"
                    return
            else:
                return

    def _prefill_request(self, turn: Turn) -> PrefillRequest:
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

    async def _receive(self, turn: Turn, result: PrefillResult) -> None:
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

    async def _replace_reservation(self, turn: Turn) -> None:
        """After a failed transfer: other blocks, if those reserved are in quarantine; none if none are free."""
        if turn.reservation is None or turn.reservation.is_open:
            return
        turn.reservation = None
        try:
            turn.reservation = await self._exchange.reserve(turn.request.token_ids, turn.salt)
        except OutOfBlocks as error:
            self._warn(turn, "no blocks to replace those in quarantine", error)

    def _warn(self, turn: Turn, event: str, error: AntiphonError) -> None:
        request = turn.request
        fields = {"request_id": request.request_id, "session": request.session_digest, "turn": request.turn}
        log.warning(event, extra={**fields, "reason": error.reason})
