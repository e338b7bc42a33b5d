"""Computes prompts for decode replicas: fetches the history it lacks, samples the next token, lends the new blocks."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from services.common.errors import TransferFailed, Unavailable
from services.common.sampling import FinishReason
from services.engine.engine import EngineOutput, EngineRequest
from services.engine.loop import EngineLoop
from services.engine.scheduler import Reservation
from services.replica.exchange import BlockExchange
from services.replica.handover import HistoryClient, PrefillRequest, PrefillResult, blocks_between
from services.transfer.base import FetchReport

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Prompt:
    """A request on its way. reservation: None once its blocks are a sequence's, or in quarantine."""

    request: PrefillRequest
    token_ids: tuple[int, ...]
    reservation: Reservation | None
    num_cached_tokens: int
    fetched: FetchReport | None = None


class PrefillWorker:
    """One engine that computes prompts for others. peers: reaches the decode replicas that hold history."""

    def __init__(self, loop: EngineLoop, exchange: BlockExchange, peers: HistoryClient) -> None:
        self._loop = loop
        self._exchange = exchange
        self._peers = peers

    @asynccontextmanager
    async def run(self, request: PrefillRequest) -> AsyncIterator[PrefillResult]:
        """The next token, and the KV that the asker lacks, lent until the context ends or the lease does.

        Raises OutOfBlocks before any work, QueueFull, InvalidRequest, NumericsError, TransferFailed, Unavailable.
        """
        prompt = await self._admit(request)
        try:
            await self._fetch_history(prompt)
            started_s = time.perf_counter()
            output = await self._compute(prompt)
            prefill_ms = (time.perf_counter() - started_s) * 1e3
        finally:
            if prompt.reservation is not None:
                self._exchange.give_back(prompt.reservation)
        result = await self._lend(prompt, output, prefill_ms)
        try:
            yield result
        finally:
            await self._exchange.release(result.ticket)

    async def _admit(self, request: PrefillRequest) -> _Prompt:
        token_ids = request.token_ids
        reservation = await self._exchange.reserve(token_ids, request.salt)
        return _Prompt(request, token_ids, reservation, reservation.num_cached_tokens)

    async def _fetch_history(self, prompt: _Prompt) -> None:
        """What the asker holds and this replica does not; without it the history is computed once more."""
        request, reservation = prompt.request, prompt.reservation
        assert reservation is not None
        if request.num_held_tokens <= reservation.num_computed_tokens:
            return
        try:
            prompt.fetched = await self._exchange.fetch_history(
                self._peers, reservation, request.holder, request.num_held_tokens, request.salt
            )
        except (TransferFailed, Unavailable) as error:
            log.warning("history is computed again", extra={"request_id": request.request_id, "reason": error.reason})
        if reservation.is_open:
            prompt.num_cached_tokens = reservation.num_computed_tokens
        else:  # in quarantine: the sequence waits for other blocks
            prompt.reservation = None

    async def _compute(self, prompt: _Prompt) -> EngineOutput:
        """The output with the next token; the blocks of its table are referenced for the caller."""
        request = prompt.request
        # One token more than there are. Whether it also ends the reply for its length is the asker's to say.
        sampling = replace(request.sampling, max_tokens=len(request.resumed_token_ids) + 1)
        engine_request = EngineRequest(
            request_id=f"{request.request_id}/{uuid.uuid4().hex}",  # the asker may come again with the same id
            prompt_token_ids=request.prompt_token_ids,
            sampling=sampling,
            tenant_salt=request.salt,
            resumed_token_ids=request.resumed_token_ids,
            keeps_blocks=True,
        )
        task = asyncio.ensure_future(self._last_output(engine_request, prompt.reservation))
        try:
            output = await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.shield(asyncio.ensure_future(self._abandon(engine_request.request_id, task)))
            raise
        if output.error is not None:
            raise output.error
        return output

    async def _last_output(self, request: EngineRequest, reservation: Reservation | None) -> EngineOutput:
        async with aclosing(self._loop.generate(request, reservation)) as outputs:
            async for output in outputs:
                if output.finish_reason is not None:
                    return output
        raise Unavailable("the engine ended the sequence without a token")

    async def _abandon(self, request_id: str, task: asyncio.Task[EngineOutput]) -> None:
        """Ends a sequence that nobody waits for; one that has just ended has kept blocks, which have to go back."""
        if await self._loop.call(lambda engine: engine.abort(request_id)):
            task.cancel()
            await asyncio.wait({task})
            return
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is None:
            self._exchange.release_blocks(task.result().block_table)

    async def _lend(self, prompt: _Prompt, output: EngineOutput, prefill_ms: float) -> PrefillResult:
        request, size = prompt.request, self._exchange.block_size
        num_tokens, first = len(prompt.token_ids), request.num_held_tokens
        lent = blocks_between(output.block_table, first, num_tokens, size)
        self._exchange.release_blocks(_others(output.block_table, first // size, len(lent)))
        ticket = await self._exchange.publish(lent, first, num_tokens - first, request.into_block_ids)
        fetched = prompt.fetched
        return PrefillResult(
            replica=self._exchange.identity,
            token_id=output.token_ids[0],
            logprobs=output.logprobs[0] if output.logprobs else None,
            is_stop=output.finish_reason is FinishReason.STOP,
            ticket=ticket,
            num_cached_tokens=max(prompt.num_cached_tokens, output.num_cached_tokens),
            prefill_ms=prefill_ms,
            transfer_ms=fetched.total_ms if fetched else 0.0,
            transfer_bytes=fetched.num_bytes if fetched else 0,
        )


def _others(table: Sequence[int], first: int, num_blocks: int) -> tuple[int, ...]:
    """The blocks of a table but for num_blocks of them from index `first` on."""
    return (*table[:first], *table[first + num_blocks :])
