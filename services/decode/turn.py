"""One turn at a decode replica: what is asked, what comes back, and the record that is kept while it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.common.messages import KvOrigin, KvSource, PrefillPlace, Timings, Usage
from services.common.sampling import FinishReason, SamplingParams, TokenLogprobs
from services.engine.engine import Engine, EngineOutput
from services.engine.scheduler import Reservation
from services.replica.handover import PrefillResult
from services.transfer.base import FetchReport, Identity


@dataclass(frozen=True, slots=True)
class HistoryHolder:
    """Another replica's process that is believed to hold KV of the first num_computed_tokens tokens."""

    identity: Identity
    num_computed_tokens: int


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """One turn. resumed_token_ids: reply tokens that the caller has already; they follow the prompt.

    fence: of the session's lease; session_digest is empty without a session. holders: others than this replica.
    call_id: by which the caller may end the reply; empty if it will not.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    salt: bytes
    resumed_token_ids: tuple[int, ...] = ()
    holders: tuple[HistoryHolder, ...] = ()
    session_digest: str = ""
    turn: int = 0
    fence: int = 0
    call_id: str = ""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Everything whose KV is needed before the next token."""
        return self.prompt_token_ids + self.resumed_token_ids


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


@dataclass(frozen=True, slots=True)
class Admitted:
    """First event: the sequence has its blocks. num_cached_tokens: matched in the replica's own pool."""

    num_cached_tokens: int
    num_reserved_blocks: int


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """New tokens; index counts from the start of the reply. prompt_logprobs: in the first chunk, if asked for."""

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodeFinished:
    """Last event. num_computed_tokens: leading tokens of prompt and reply whose blocks stay findable here."""

    reason: FinishReason
    usage: Usage
    timings: Timings
    kv_origins: tuple[KvOrigin, ...]
    prefill_place: PrefillPlace
    prefill_reason: str
    num_computed_tokens: int


DecodeEvent = Admitted | TokenChunk | DecodeFinished


@dataclass(frozen=True, slots=True)
class PrefilledToken:
    """What stays of a PrefillResult: a turn may last, and the ticket in it keeps memory of the publisher."""

    replica: str
    is_stop: bool
    num_cached_tokens: int


class TurnRecord:
    """What a turn has come to so far. replica: the name of this one.

    next_token_ids: reply tokens that came with the prompt from a prefill replica (one or none). new_token_ids: of the
    reply, all that came after the resumed ones. num_local_tokens and
    num_fetched_tokens: of the prompt, held here and fetched from `fetched_from`.
    """

    def __init__(self, request: DecodeRequest, replica: str) -> None:
        self.request = request
        self.replica = replica
        self.place = PrefillPlace.DECODE
        self.reason = ""
        self.num_local_tokens = 0
        self.num_fetched_tokens = 0
        self.fetched_from = ""
        self.prefilled: PrefilledToken | None = None
        self.has_prefilled_blocks = False
        self.next_token_ids: tuple[int, ...] = ()
        self.new_token_ids: list[int] = []
        self.num_generated_tokens = len(request.resumed_token_ids)
        self._timings = Timings()
        self._arrived_s = time.perf_counter()
        self._first_token_s: float | None = None
        self._last_token_s = self._arrived_s

    @property
    def since_arrival_ms(self) -> float:
        return (time.perf_counter() - self._arrived_s) * 1e3

    @property
    def has_first_token(self) -> bool:
        return self._first_token_s is not None

    def admitted(self, num_local_tokens: int) -> None:
        """Blocks are reserved, and some of them hold what is needed already."""
        self.num_local_tokens = num_local_tokens
        self._timings = replace(self._timings, queue_ms=self.since_arrival_ms)

    def fetched(self, report: FetchReport) -> None:
        """KV blocks have arrived."""
        self._moved(report.total_ms, report.num_bytes)

    def prefill_result(self, result: PrefillResult) -> TokenChunk:
        """A prefill replica has the next token; its KV blocks are still to be fetched."""
        self.prefilled = PrefilledToken(result.replica.replica_id, result.is_stop, result.num_cached_tokens)
        self._moved(result.transfer_ms, result.transfer_bytes)
        self._timings = replace(self._timings, prefill_ms=self._timings.prefill_ms + result.prefill_ms)
        self.next_token_ids = (result.token_id,)
        return self._chunk(self.next_token_ids, () if result.logprobs is None else (result.logprobs,))

    def output(self, output: EngineOutput, started_s: float) -> TokenChunk:
        """The engine, asked at started_s (perf_counter), has new tokens."""
        if not self.has_first_token:
            waited_ms = (time.perf_counter() - started_s) * 1e3
            self._timings = replace(self._timings, prefill_ms=self._timings.prefill_ms + waited_ms)
        if not self.has_prefilled_blocks:
            # As the engine saw it: the last block is computed again where everything was held.
            self.num_local_tokens = min(output.num_cached_tokens, self._num_prompt_tokens)
        return self._chunk(output.token_ids, output.logprobs, output.prompt_logprobs)

    def length_reached(self, max_seq_len: int) -> bool:
        """Whether the reply ends here for its length."""
        max_tokens = self.request.sampling.max_tokens
        num_tokens = self._num_prompt_tokens + self.num_generated_tokens
        return num_tokens >= max_seq_len or (max_tokens is not None and self.num_generated_tokens >= max_tokens)

    def finished(self, reason: FinishReason, num_computed_tokens: int) -> DecodeFinished:
        """The last event."""
        origins = self._origins()
        num_cached = sum(o.num_tokens for o in origins if o.source in (KvSource.LOCAL, KvSource.FETCHED))
        first_token_s = self._first_token_s or self._last_token_s
        timings = replace(
            self._timings,
            first_token_ms=(first_token_s - self._arrived_s) * 1e3,
            replica_first_token_ms=(first_token_s - self._arrived_s) * 1e3,
            decode_ms=(self._last_token_s - first_token_s) * 1e3,
            total_ms=self.since_arrival_ms,
        )
        usage = Usage(self._num_prompt_tokens, num_cached, self.num_generated_tokens)
        return DecodeFinished(reason, usage, timings, origins, self.place, self.reason, num_computed_tokens)

    @property
    def _num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    def _chunk(
        self,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        prompt_logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> TokenChunk:
        self._last_token_s = time.perf_counter()
        self._first_token_s = self._first_token_s or self._last_token_s
        chunk = TokenChunk(self.num_generated_tokens, token_ids, logprobs, prompt_logprobs)
        self.num_generated_tokens += len(token_ids)
        self.new_token_ids += token_ids
        return chunk

    def _moved(self, total_ms: float, num_bytes: int) -> None:
        self._timings = replace(
            self._timings,
            transfer_ms=self._timings.transfer_ms + total_ms,
            transfer_bytes=self._timings.transfer_bytes + num_bytes,
        )

    def _origins(self) -> tuple[KvOrigin, ...]:
        """By position, of the prompt's tokens only (a resumed turn has brought reply tokens along)."""
        runs = [
            (KvSource.LOCAL, self.replica, self.num_local_tokens),
            (KvSource.FETCHED, self.fetched_from, self.num_local_tokens + self.num_fetched_tokens),
        ]
        if self.prefilled is not None and self.has_prefilled_blocks:
            name = self.prefilled.replica
            runs.append((KvSource.FETCHED, name, self.prefilled.num_cached_tokens))
            runs.append((KvSource.PREFILL, name, self._num_prompt_tokens))
        runs.append((KvSource.COMPUTED, self.replica, self._num_prompt_tokens))
        return _runs(runs, self._num_prompt_tokens)


@dataclass(slots=True)
class Turn:
    """A turn while it runs. reservation: None where the engine's own queue has to find the blocks.

    is_stopped: the caller has found the end of the reply.
    """

    request: DecodeRequest
    record: TurnRecord
    salt: bytes
    reservation: Reservation | None = None
    is_stopped: bool = False


def _runs(ends: Sequence[tuple[KvSource, str, int]], num_tokens: int) -> tuple[KvOrigin, ...]:
    """Origins from (source, replica, end position): each run begins where the one before it ends."""
    origins, start = [], 0
    for source, name, end in ends:
        end = min(end, num_tokens)
        if end > start:
            origins.append(KvOrigin(source, name, end - start))
            start = end
    return tuple(origins)
