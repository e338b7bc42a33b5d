"""The turn: acquire -> tokenize -> route -> stream -> commit. `Pipeline.generate` is the whole of it, top to bottom.

What a turn holds is given back wherever it ends: the lease by its block, the sequence on the replica by closing the
stream, the count of pending tokens by its block. So cancelling the generator at any await is enough.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from services.common.errors import Exhausted, StaleLease, Unavailable
from services.common.messages import (
    Explanation,
    Finished,
    RoutingReason,
    Started,
    TurnEvent,
    TurnRequest,
    Usage,
)
from services.common.sampling import SamplingParams
from services.common.settings import Settings
from services.common.telemetry import Metrics
from services.gateway import router
from services.gateway.attempts import Attempts
from services.gateway.decode_client import DecodeClient
from services.gateway.decode_request import TurnIdentity, decode_request
from services.gateway.history import History, HistoryEnds
from services.gateway.replay import replayed
from services.gateway.replicas import Replicas
from services.gateway.reply import Reply
from services.gateway.router import Route, RoutingQuestion
from services.gateway.sessions import GatewaySessions, TurnLease, acquire
from services.gateway.text import Encoder
from services.gateway.watch import Watch
from services.pb.antiphon.internal.v1 import decode_service_pb2 as pb
from services.sessions.base import Acquired, AlreadyCommitted, SessionStore, TurnRecord, TurnStart
from services.sessions.from_settings import tenant_salt
from services.sessions.keys import Keyspace
from services.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_ROUTE_RETRY_DELAY_S = 0.1


@dataclass(frozen=True, slots=True)
class PipelineParts:
    """What a pipeline works with. All of it is shared by the turns of one gateway."""

    settings: Settings
    keyspace: Keyspace
    store: SessionStore
    sessions: GatewaySessions
    replicas: Replicas
    decode: DecodeClient
    encoder: Encoder
    tokenizer: Tokenizer
    template_digest: str
    kv_token_bytes: int
    metrics: Metrics
    history_ends: HistoryEnds = field(default_factory=HistoryEnds)
    rng: random.Random = field(default_factory=random.Random)


class Pipeline:
    """Implements pipeline_api.Turns for a cluster."""

    def __init__(self, parts: PipelineParts) -> None:
        self._parts = parts

    async def generate(self, turn: TurnRequest) -> AsyncGenerator[TurnEvent]:
        """One turn. Raises SessionBusy, NotFound, QuotaExceeded, PromptTooLong, Exhausted, Unavailable, StaleLease."""
        parts, watch, attempts = self._parts, Watch(), Attempts(self._parts.settings.routing.max_resumes)

        # 1. The session: its lease and its history. A repeated idempotency key brings the old reply back.
        acquired = await self._acquire(turn)
        if isinstance(acquired, AlreadyCommitted):
            for event in replayed(turn, acquired, parts.tokenizer, watch):
                yield event
            return
        async with TurnLease(parts.store, acquired, parts.settings.sessions.lease_ttl_s).held() as lease:
            history = self._history(acquired)
            watch.lap("session_ms")

            # 2. Only the new messages become tokens; the history is token ids already.
            new_ids = await self._encode(turn, history)
            prompt = (*history.token_ids, *new_ids)
            reply = Reply(len(prompt), turn.sampling, parts.tokenizer)
            sampling, identity = _with_seed(turn.sampling), self._identity(turn, history, lease)
            watch.lap("tokenize_ms")

            # 3. and 4. A replica, and its stream. If it is lost, another one goes on from prompt + reply so far.
            while not reply.is_complete:
                route = await self._route(turn, history, len(prompt), attempts, parts.settings.sessions.registry_ttl_s)
                so_far = (*prompt, *reply.token_ids)
                request = decode_request(identity, route, history, so_far, len(reply.token_ids), sampling)
                watch.lap("route_ms")
                num_new_tokens = len(so_far) - route.num_held_tokens
                try:
                    async with (
                        parts.replicas.sending(route.record.replica_id, num_new_tokens) as computed,
                        aclosing(self._stream(turn, route, request)) as stream,
                    ):
                        async for message in stream:
                            lease.check()
                            kind = message.WhichOneof("event")
                            if kind == "admitted":
                                reply.admitted(message.admitted, route.record.replica_id)
                                if attempts.admitted():
                                    yield self._started(turn, history, len(prompt), route, reply)
                            elif kind == "chunk" and not reply.is_complete:
                                computed()
                                # 5. Text: whole characters, nothing of a stop string.
                                delta = reply.push(message.chunk)
                                watch.saw_token()
                                yield delta
                                if reply.has_stopped:
                                    await parts.decode.stop(route.record.address, request.call_id)
                            elif kind == "finished":
                                reply.finished(message.finished)
                except (Unavailable, Exhausted) as error:
                    reply.end_if_nothing_is_left()
                    if not reply.is_complete:
                        self._failed(turn, history, route, error, attempts)
            if rest := reply.rest():
                yield rest

            # 6. The journal, the holders and the end of the lease, at once. Then the client may know.
            await self._commit(turn, lease, new_ids, history, route, reply)
        yield self._finished(turn, history, len(prompt), route, reply, attempts, watch)

    async def explain(self, turn: TurnRequest) -> Explanation:
        """The same decision as generate's, of a turn that does not run."""
        history = History()
        if turn.session is not None:
            record = await self._parts.store.get(turn.tenant, turn.session)
            self._parts.sessions.check_same_model(record)
            ended_with_eos = self._parts.history_ends.ended_with_eos(turn.tenant, record)
            history = History.unread(record, ended_with_eos)
        num_prompt_tokens = history.num_tokens + len(await self._encode(turn, history))
        route = await self._route(turn, history, num_prompt_tokens, Attempts(0))
        return Explanation(route.decision, num_prompt_tokens, route.num_cached_tokens)

    async def _acquire(self, turn: TurnRequest) -> Acquired | AlreadyCommitted | None:
        if turn.session is None:
            return None
        num_chars = sum(len(message.content) for message in turn.messages)
        needed_bytes = 4 * (len(turn.token_ids) + num_chars // 4 + (turn.sampling.max_tokens or 0))
        start = TurnStart(turn.idempotency_key, needed_bytes)
        lease_ttl_s = self._parts.settings.sessions.lease_ttl_s
        return await acquire(self._parts.store, turn.tenant, turn.session, start, lease_ttl_s)

    def _history(self, acquired: Acquired | None) -> History:
        if acquired is None:
            return History()
        self._parts.sessions.check_same_model(acquired.session)
        return History.of(acquired, self._parts.tokenizer.eos_token_ids)

    async def _encode(self, turn: TurnRequest, history: History) -> tuple[int, ...]:
        if turn.token_ids:
            return turn.token_ids
        is_first = history.num_turns == 0
        return tuple(await self._parts.encoder.encode_turn(turn.messages, is_first, history.ended_with_eos))

    async def _route(
        self, turn: TurnRequest, history: History, num_prompt_tokens: int, attempts: Attempts, patience_s: float = 0.0
    ) -> Route:
        """Raises what the last attempt met if there is nobody left to try.

        Of a first attempt, Unavailable if nobody is there within patience_s: the only replica may have stalled and left
        the registry, or have failed another turn, and is back as soon as a registration ends.
        """
        parts, give_up_s = self._parts, time.monotonic() + patience_s
        question = RoutingQuestion(
            session_digest=self._digest(turn) or turn.request_id,
            num_prompt_tokens=num_prompt_tokens,
            holders=history.holders if parts.settings.decode.reuse_history else (),
            kv_token_bytes=parts.kv_token_bytes,
            pending_tokens=parts.replicas.pending_tokens,
            excluded=attempts.excluded,
        )
        while True:
            records = await parts.replicas.list()
            await parts.decode.forget_others([record.address for record in records])
            try:
                return router.choose(question, records, parts.settings.routing, parts.rng)
            except Unavailable:
                if attempts.last_error is not None:
                    raise attempts.last_error from None
                if time.monotonic() >= give_up_s:
                    raise
            await asyncio.sleep(_ROUTE_RETRY_DELAY_S)

    def _failed(
        self, turn: TurnRequest, history: History, route: Route, error: Unavailable | Exhausted, attempts: Attempts
    ) -> None:
        """Notes a lost or full replica. Raises the error if the turn cannot go on elsewhere."""
        is_lost = isinstance(error, Unavailable)
        if is_lost:
            self._parts.replicas.lost(route.record)
        fields = self._log_fields(turn, history, route) | {"reason": error.reason}
        log.warning("a replica %s a turn", "lost" if is_lost else "refused", extra=fields)
        if attempts.is_running:
            labels = {"from": "decode", "outcome": "resumed" if attempts.may_resume else "given_up"}
            self._parts.metrics.increment("migrations", 1.0, **labels)
        attempts.failed(route, error)

    async def _commit(
        self,
        turn: TurnRequest,
        lease: TurnLease,
        new_ids: tuple[int, ...],
        history: History,
        route: Route,
        reply: Reply,
    ) -> None:
        assert reply.finish_reason is not None
        parts = self._parts
        digest = parts.template_digest if turn.messages else ""
        record = TurnRecord(new_ids, tuple(reply.token_ids), reply.finish_reason, digest)
        try:
            await lease.commit(record, history.holders_after(route, reply.num_computed_tokens))
        except StaleLease:
            parts.metrics.increment("fence_rejections")
            raise
        if turn.session is not None:
            ended_with_eos = reply.token_ids[-1:] != [] and reply.token_ids[-1] in parts.tokenizer.eos_token_ids
            parts.history_ends.note(turn.tenant, turn.session, history.num_turns + 1, ended_with_eos)

    def _started(self, turn: TurnRequest, history: History, num_prompt: int, route: Route, reply: Reply) -> Started:
        if history.num_turns:
            # An heir may not have got yet what it is to inherit.
            is_hit = route.decision.reason is RoutingReason.HELD_PREFIX and reply.num_cached_tokens > 0
            self._parts.metrics.increment("affinity_hits" if is_hit else "affinity_misses")
        num_cached = max(reply.num_cached_tokens, route.num_cached_tokens)
        return Started(turn.request_id, turn.session, _number(turn, history), num_prompt, num_cached, route.decision)

    def _finished(
        self,
        turn: TurnRequest,
        history: History,
        num_prompt: int,
        route: Route,
        reply: Reply,
        attempts: Attempts,
        watch: Watch,
    ) -> Finished:
        assert reply.finish_reason is not None
        timings = watch.timings(reply.timings)
        fields = self._log_fields(turn, history, route)
        log.info("turn ended", extra=fields | {"duration_ms": timings.total_ms, "reason": reply.finish_reason.value})
        return Finished(
            reply.finish_reason,
            Usage(num_prompt, min(reply.num_cached_tokens, num_prompt), len(reply.token_ids)),
            timings,
            route.record.replica_id,
            reply.kv_origins,
            reply.prefill_place,
            reply.prefill_reason,
            attempts.num_resumes,
        )

    def _stream(
        self, turn: TurnRequest, route: Route, request: pb.GenerateRequest
    ) -> AsyncGenerator[pb.GenerateResponse]:
        remaining_s = None if turn.deadline_s is None else max(turn.deadline_s - time.monotonic(), 0.001)
        silence = self._parts.replicas.silence(route.record)
        return self._parts.decode.generate(route.record.address, request, remaining_s, turn.traceparent, silence)

    def _log_fields(self, turn: TurnRequest, history: History, route: Route) -> dict[str, object]:
        return {
            "request_id": turn.request_id, "session": self._digest(turn), "turn": _number(turn, history),
            "replica": route.record.replica_id,
        }  # fmt: skip

    def _identity(self, turn: TurnRequest, history: History, lease: TurnLease) -> TurnIdentity:
        salt = tenant_salt(self._parts.keyspace, turn.tenant)
        return TurnIdentity(turn.request_id, self._digest(turn), _number(turn, history), lease.fence, salt)

    def _digest(self, turn: TurnRequest) -> str:
        return "" if turn.session is None else self._parts.keyspace.session_digest(turn.tenant, turn.session)


def _number(turn: TurnRequest, history: History) -> int:
    """Of the turn in its session, from 1; 0 without a session."""
    return history.num_turns + 1 if turn.session is not None else 0


def _with_seed(sampling: SamplingParams) -> SamplingParams:
    """Stop strings stay here; a random turn gets a seed, so that another replica can go on with the same draws."""
    sampling = dataclasses.replace(sampling, stop=())
    if not sampling.is_greedy and sampling.seed is None:
        sampling = dataclasses.replace(sampling, seed=secrets.randbits(63))
    return sampling
