"""The engine: requests in, tokens out, one step at a time.

    schedule  ->  run  ->  sample  ->  commit

Single-threaded; loop.py runs it on a thread for asyncio. On a GPU the next step is under way before the tokens of one
are read (flights.py): an end that shows then has cost one token for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass

from torch import Tensor

from services.common.errors import AntiphonError, InvalidRequest, NumericsError
from services.common.prefix_hash import PrefixHasher
from services.common.sampling import FinishReason, SamplingParams, TokenLogprobs
from services.engine.batch import wants_all_logits
from services.engine.flights import Flights, sampling_row
from services.engine.fused_runner import FusedRunner
from services.engine.kv_cache import KVLayout
from services.engine.rates import Rates
from services.engine.runner import Runner
from services.engine.sampler import Sampled, Sampler, check_vocabulary, no_token, prompt_logprobs, resolve_seed
from services.engine.scheduler import Chunk, Reservation, Scheduler
from services.engine.sequence import Sequence

# Prefix hashers kept by tenant; one that was dropped is made again, the same.
_MAX_HASHERS = 1024


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A prompt to go on from.

    resumed_token_ids: reply tokens generated elsewhere already; they follow the prompt, count as generated, and are not
    output again. keeps_blocks: at a normal end the blocks stay referenced, until `release_blocks`.
    on_prompt_logits: called with (position of the first row, logits [rows, vocab]) for the prompt, chunk by chunk, if
    the sampling wants prompt logprobs; the rows are valid during the call.
    """

    request_id: str
    prompt_token_ids: ListLike[int]
    sampling: SamplingParams
    tenant_salt: bytes = b""
    resumed_token_ids: ListLike[int] = ()
    keeps_blocks: bool = False
    on_prompt_logits: Callable[[int, Tensor], None] | None = None


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What a step gave one request. finish_reason or error is set on its last output.

    prompt_logprobs: one a prompt token from the second on, in the first output with tokens.
    num_cached_tokens: prompt tokens whose KV was found, not computed. block_table: with keeps_blocks, on the last.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: AntiphonError | None = None
    num_cached_tokens: int = 0
    block_table: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Load and speed now. Rates are moving averages in tokens a second, None until measured.

    num_running_tokens: of the sequences that run, computed or not; num_waiting_tokens: still to be computed, of those
    that run or wait. num_prefilled_tokens: computed as prompts since the start. num_evictable_blocks: of the free ones,
    those that hold something that could be found.
    """

    num_blocks: int
    num_free_blocks: int
    num_running: int
    num_waiting: int
    num_running_tokens: int
    num_waiting_tokens: int
    num_preemptions: int
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    num_prefilled_tokens: int = 0
    num_evictable_blocks: int = 0


@dataclass(slots=True)
class _Live:
    """A request in the engine. prompt_logprobs gathers over the chunks of its prompt."""

    seq: Sequence
    num_resumed: int
    seed: int
    prompt_logprobs: list[TokenLogprobs]
    on_prompt_logits: Callable[[int, Tensor], None] | None


class Engine:
    """One model, one KV pool, many sequences."""

    def __init__(
        self,
        runner: Runner | FusedRunner,
        scheduler: Scheduler,
        eos_token_ids: Iterable[int],
        *,
        prefix_caching: bool = True,
    ) -> None:
        self.config = runner.model.config
        self.layout: KVLayout = runner.cache.layout
        self.kv_cache = runner.cache
        self.scheduler = scheduler
        self.pool = scheduler.pool
        self.eos_token_ids = frozenset(eos_token_ids)
        self._runner = runner
        self._sampler = Sampler()
        self._flights = Flights(runner, scheduler) if isinstance(runner, FusedRunner) else None
        self._rates = Rates()
        self._prefix_caching = prefix_caching
        self._live: dict[str, _Live] = {}
        self.is_stuck = False  # the last step found all blocks held outside
        self._hashers: dict[bytes, PrefixHasher] = {}

    # Requests.

    def add(self, request: EngineRequest, reservation: Reservation | None = None) -> None:
        """Queues a request. Raises InvalidRequest, PromptTooLong or QueueFull with nothing changed."""
        self._check_tokens("prompt", request.prompt_token_ids)
        if request.resumed_token_ids:
            self._check_tokens("resumed_token_ids", request.resumed_token_ids)
        check_vocabulary(request.sampling, self.config.vocab_size)
        seq = Sequence(
            request.request_id,
            request.prompt_token_ids,
            request.sampling,
            self.hasher(request.tenant_salt),
            eos_token_ids=self.eos_token_ids,
            keeps_blocks=request.keeps_blocks,
        )
        if not self._prefix_caching:
            seq.reuses_prefix = False
        for token_id in request.resumed_token_ids:
            seq.append(token_id)
        self.scheduler.add(seq, reservation)
        self._live[seq.seq_id] = _Live(
            seq, len(request.resumed_token_ids), resolve_seed(request.sampling), [], request.on_prompt_logits
        )

    def abort(self, request_id: str) -> bool:
        """Ends a request and frees everything it holds; False if it is not here."""
        return self.finish(request_id, FinishReason.ABORTED)

    def finish(self, request_id: str, reason: FinishReason) -> bool:
        """Ends a request for a reason found outside, such as a stop string; False if it is not here."""
        self._live.pop(request_id, None)
        return self.scheduler.finish(request_id, reason)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or (self._flights is not None and self._flights.is_under_way)

    def step(self) -> list[EngineOutput]:
        """Computes one step. Empty if there was nothing to do, or nothing was finished far enough to be sampled."""
        try:
            if self._flights is not None and self._flights.is_under_way:
                return self._land(self._flights)
            chunks = self.scheduler.schedule()
            self.is_stuck = not chunks
            if not chunks:
                return []
            if self._flights is not None and self._flights.takes(chunks):
                self._flights.launch(chunks, self._live)
                return self._land(self._flights)
            return self._compute(chunks)
        except BaseException:
            if self._flights is not None:
                self._flights.forget()
            while self.scheduler.has_open_step:
                self.scheduler.commit((), {})
            raise

    def _compute(self, chunks: list[Chunk]) -> list[EngineOutput]:
        """A step that is waited for."""
        started_s = time.perf_counter()
        logits = self._runner.run(chunks)
        sampled, outputs = self._sample(chunks, logits)
        self.scheduler.commit(chunks, sampled)
        self._rates.record(chunks, time.perf_counter() - started_s)
        return [self._output(seq_id, row) for seq_id, row in outputs]

    def _land(self, flights: Flights) -> list[EngineOutput]:
        """Launches the step after the one under way, if it can be known, and then waits for that one's tokens."""
        flights.launch_ahead(self._live)
        chunks, tokens, elapsed_s = flights.land()
        outputs = [
            (seq.seq_id, Sampled(token_id) if token_id >= 0 else no_token(seq.num_generated_tokens))
            for seq, token_id in tokens
            if not seq.is_finished  # it ended by the token before, or was ended from outside
        ]
        for seq_id, result in outputs:
            if result.error is not None:
                self.scheduler.finish(seq_id, FinishReason.ERROR)
        self.scheduler.commit(chunks, {seq_id: row.token_id for seq_id, row in outputs if row.error is None})
        self._rates.record(chunks, elapsed_s)
        return [self._output(seq_id, row) for seq_id, row in outputs]

    def _sample(self, chunks: ListLike[Chunk], logits: Tensor) -> tuple[dict[str, int], list[tuple[str, Sampled]]]:
        """The next token of each chunk that samples. A sequence whose logits are not numbers ends here, alone."""
        rows, sampling, row = [], [], 0
        unscored: list[tuple[str, Sampled]] = []
        for chunk in chunks:
            live = self._live.get(chunk.seq.seq_id)
            width = chunk.num_tokens if wants_all_logits(chunk) else int(chunk.samples)
            if live is not None and wants_all_logits(chunk):
                try:
                    self._gather_prompt_logprobs(live, chunk, logits[row : row + width])
                except NumericsError as error:
                    unscored.append((chunk.seq.seq_id, Sampled(-1, error=error)))
                    live = None
            row += width
            if chunk.samples and live is not None:
                rows.append(row - 1)
                sampling.append((chunk.seq.seq_id, sampling_row(live.seq, live.seed)))
        picked = logits if len(rows) == logits.shape[0] else logits[rows]
        results = self._sampler.sample(picked, [each for _, each in sampling])
        outputs = [(seq_id, result) for (seq_id, _), result in zip(sampling, results, strict=True)] + unscored
        for seq_id, result in outputs:
            if result.error is not None:
                self.scheduler.finish(seq_id, FinishReason.ERROR)
        return {seq_id: result.token_id for seq_id, result in outputs if result.error is None}, outputs

    def _gather_prompt_logprobs(self, live: _Live, chunk: Chunk, logits: Tensor) -> None:
        """Logprobs of the prompt tokens that follow those of the chunk (again after a preemption: once only)."""
        seq = live.seq
        next_ids = seq.token_ids[chunk.start + 1 : min(chunk.start + chunk.num_tokens + 1, seq.num_prompt_tokens)]
        if live.on_prompt_logits is not None:
            live.on_prompt_logits(chunk.start, logits[: seq.num_prompt_tokens - chunk.start])
        first = len(live.prompt_logprobs) - chunk.start
        if 0 <= first < len(next_ids):
            wanted = seq.sampling.prompt_logprobs or 0
            live.prompt_logprobs += prompt_logprobs(logits[first : len(next_ids)], next_ids[first:], wanted)

    def _output(self, seq_id: str, result: Sampled) -> EngineOutput:
        live = self._live[seq_id]
        seq = live.seq
        if seq.is_finished:
            del self._live[seq_id]
        if result.error is not None:
            return EngineOutput(seq_id, finish_reason=FinishReason.ERROR, error=result.error)
        is_first = seq.num_generated_tokens - live.num_resumed == 1
        return EngineOutput(
            seq_id,
            (result.token_id,),
            () if result.logprobs is None else (result.logprobs,),
            tuple(live.prompt_logprobs) if is_first else (),
            seq.finish_reason,
            None,
            seq.num_cached_tokens,
            tuple(seq.block_table) if seq.is_finished and seq.keeps_blocks else (),
        )

    # KV that is held, reserved or moved.

    def hasher(self, tenant_salt: bytes) -> PrefixHasher:
        """Prefix hashes of one tenant: no two tenants, models or layouts share one."""
        hasher = self._hashers.get(tenant_salt)
        if hasher is None:
            seed = self.layout.fingerprint.encode()
            if len(self._hashers) >= _MAX_HASHERS:  # a salt a turn, where nothing is reused
                del self._hashers[next(iter(self._hashers))]
            hasher = self._hashers[tenant_salt] = PrefixHasher(seed, self.layout.block_size, tenant_salt)
        return hasher

    def match(self, token_ids: ListLike[int], tenant_salt: bytes = b"") -> int:
        """Leading tokens whose KV is held, in full blocks; changes nothing."""
        return len(self.pool.match(self.hasher(tenant_salt).hashes(list(token_ids)))) * self.layout.block_size

    def hold(self, token_ids: ListLike[int], tenant_salt: bytes = b"") -> tuple[list[int], int]:
        """References the blocks of the longest held prefix: (block ids, tokens). Undo with release_blocks."""
        block_ids = self.pool.match(self.hasher(tenant_salt).hashes(list(token_ids)))
        self.pool.acquire(block_ids)
        return block_ids, len(block_ids) * self.layout.block_size

    def release_blocks(self, block_ids: Iterable[int]) -> None:
        """Gives back blocks kept by `hold` or keeps_blocks."""
        self.pool.release(list(block_ids))

    def evict_first(self, token_ids: ListLike[int], tenant_salt: bytes = b"") -> int:
        """KV of these tokens that nobody uses now, and no other prefix needs, is evicted before all other; blocks."""
        return self.pool.evict_first(self.hasher(tenant_salt).hashes(list(token_ids)))

    def reserve(self, token_ids: ListLike[int], tenant_salt: bytes = b"") -> Reservation:
        """Blocks for the KV of all token_ids, those held here shared. Raises OutOfBlocks, InvalidRequest."""
        self._check_tokens("prompt", token_ids)
        return self.scheduler.reserve(token_ids, self.hasher(tenant_salt))

    def arrived(self, reservation: Reservation, num_tokens: int) -> None:
        """The KV of the first num_tokens tokens is in place and verified."""
        self.scheduler.arrived(reservation, num_tokens)

    def cancel(self, reservation: Reservation) -> None:
        """Gives a reservation back: nothing writes to it any more."""
        self.scheduler.cancel(reservation)

    def quarantine(self, reservation: Reservation, from_token: int) -> list[int]:
        """Ends a reservation that may still be written to; the blocks returned wait for `readmit`."""
        return self.scheduler.quarantine(reservation, from_token)

    def readmit(self, block_ids: Iterable[int]) -> None:
        """Quarantined blocks are safe again."""
        self.pool.readmit(list(block_ids))

    # Looking in.

    @property
    def model_fingerprint(self) -> str:
        """Hex digest of the architecture; replicas with different ones never exchange blocks."""
        return self.config.fingerprint.hex()[:32]

    @property
    def max_seq_len(self) -> int:
        """Most tokens of prompt and reply together."""
        return self.scheduler.max_seq_len

    @property
    def dtype_name(self) -> str:
        return str(self.kv_cache.compute_dtype).removeprefix("torch.")

    def stats(self) -> EngineStats:
        """Load and speed now."""
        scheduler, pool = self.scheduler, self.pool
        return EngineStats(
            pool.num_blocks, pool.num_free_blocks, scheduler.num_running, scheduler.num_waiting,
            scheduler.num_running_tokens, scheduler.num_waiting_tokens, scheduler.num_preemptions,
            self._rates.prefill_tokens_per_s, self._rates.decode_tokens_per_s,
            self._rates.num_prefilled_tokens, pool.num_evictable_blocks,
        )  # fmt: skip

    def check_integrity(self, tables_held_outside: Iterable[ListLike[int]] = ()) -> None:
        """Raises AssertionError on a leaked or doubly freed block."""
        self.scheduler.check_integrity(tables_held_outside)

    def _check_tokens(self, field: str, token_ids: ListLike[int]) -> None:
        if not token_ids:
            raise InvalidRequest(field, "at least one token is needed")
        if min(token_ids) < 0 or max(token_ids) >= self.config.vocab_size:
            raise InvalidRequest(field, f"token ids are 0 to {self.config.vocab_size - 1}")
