"""The whole pipeline in one process: text in, text out, no Ray, no Redis, no gRPC.

A library for scripts, what the command line runs without a cluster, and the oracle of the cluster's tests.

    pipeline = LocalPipeline.load(ModelSettings(), EngineSettings())
    session = pipeline.session()
    for event in session.turn([Message("user", "Tell me a story.")], SamplingParams(temperature=0)):
        ...

One turn: acquire the session, encode the new messages, generate, detokenize, commit. The journal is token ids as
sampled and is never rendered again, so the blocks of the turns before are found, not computed.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor

from services.common.errors import AntiphonError, InvalidCheckpoint, InvalidRequest, QueueFull
from services.common.messages import Delta, Finished, Message
from services.common.sampling import FinishReason, SamplingParams, TokenLogprobs
from services.common.settings import EngineSettings, ModelSettings
from services.engine.engine import Engine, EngineOutput, EngineRequest
from services.engine.hub import resolve_model
from services.engine.loading import load_engine
from services.engine.weights import Progress
from services.local_reply import REPLICA, LocalReply, LocalRequest
from services.sessions.base import MAX_TTL_S, Acquired, TurnRecord, TurnStart
from services.sessions.memory_store import MemorySessionStore, at_once
from services.text.chat_template import ChatEncoder
from services.text.tokenizer import Tokenizer

__all__ = ["LocalPipeline", "LocalRequest", "LocalSession", "Score"]

OnError = Callable[[int, AntiphonError], None] | None


@dataclass(frozen=True, slots=True)
class Score:
    """How likely the model finds a text. logprobs: one a token from the second on."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]

    @property
    def perplexity(self) -> float:
        """exp of the mean negative logprob; NaN for a single token."""
        if not self.logprobs:
            return math.nan
        return math.exp(-sum(each.logprob for each in self.logprobs) / len(self.logprobs))


class LocalPipeline:
    """An engine and the text around it. tokenizer: None for a checkpoint without one, which serves token ids."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self._ids = itertools.count()
        self._outputs: dict[str, deque[EngineOutput]] = {}  # of each request that runs, not looked at yet

    @classmethod
    def load(cls, model: ModelSettings, engine: EngineSettings, progress: Progress | None = None) -> LocalPipeline:
        """Loads a model and its tokenizer. Raises InvalidCheckpoint, UnsupportedConfig or InvalidSettings."""
        folder = resolve_model(model.path)
        tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
        eos = tokenizer.eos_token_ids if tokenizer is not None else ()
        return cls(load_engine(model, engine, tuple(eos), progress), tokenizer)

    @property
    def text(self) -> Tokenizer:
        """The tokenizer. Raises InvalidCheckpoint if the checkpoint has none."""
        if self.tokenizer is None:
            raise InvalidCheckpoint("tokenizer.json", "is missing: this checkpoint serves token ids only")
        return self.tokenizer

    def session(self, tenant_salt: bytes = b"") -> LocalSession:
        """A new conversation. Raises UnsupportedConfig if the checkpoint has no usable chat template."""
        return LocalSession(self, ChatEncoder.from_tokenizer(self.text), tenant_salt)

    def run(
        self, requests: Iterable[LocalRequest], on_error: OnError = None
    ) -> Generator[tuple[int, Delta | Finished]]:
        """Generates for all requests at once; yields (index of the request, event) as tokens come.

        More requests than may wait in the engine are added as room appears. Closing the iterator aborts what still
        runs. Several runs may be open at once. A request that cannot be served goes to on_error, with its index, and
        the others go on; without on_error it is raised: what `Engine.add` raises, and NumericsError.
        """
        replies: dict[str, LocalReply] = {}
        waiting = deque(enumerate(requests))
        try:
            while waiting or replies:
                while waiting and self._add(*waiting[0], replies, on_error):
                    waiting.popleft()
                for request_id, output in self._take(replies):
                    if request_id in replies:
                        yield from self._events(output, replies, on_error)
        finally:
            for request_id in replies:
                self._end(request_id, FinishReason.ABORTED)

    def _add(self, index: int, request: LocalRequest, replies: dict[str, LocalReply], on_error: OnError) -> bool:
        """Whether the request is off the list: the engine has room for it, or it cannot be served."""
        request_id = f"local-{next(self._ids)}"
        try:
            reply = LocalReply(index, request, self.tokenizer)
            self.engine.add(
                EngineRequest(request_id, request.token_ids, request.sampling, tenant_salt=request.tenant_salt)
            )
        except QueueFull:
            if not replies:
                raise
            return False
        except InvalidRequest as error:
            if on_error is None:
                raise
            on_error(index, error)
            return True
        replies[request_id] = reply
        self._outputs[request_id] = deque()
        return True

    def _take(self, request_ids: Iterable[str]) -> list[tuple[str, EngineOutput]]:
        """What is new for these requests; steps the engine if nothing is. Other runs find theirs later."""
        if not any(self._outputs[request_id] for request_id in request_ids):
            for output in self.engine.step():
                self._outputs[output.request_id].append(output)
        taken = [(request_id, output) for request_id in request_ids for output in self._outputs[request_id]]
        for request_id in request_ids:
            self._outputs[request_id].clear()
        return taken

    def _end(self, request_id: str, reason: FinishReason) -> None:
        del self._outputs[request_id]
        self.engine.finish(request_id, reason)

    def _events(
        self, output: EngineOutput, replies: dict[str, LocalReply], on_error: OnError
    ) -> Iterator[tuple[int, Delta | Finished]]:
        reply = replies[output.request_id]
        if output.error is not None:
            if on_error is None:
                raise output.error
            del replies[output.request_id]
            self._end(output.request_id, FinishReason.ERROR)
            on_error(reply.index, output.error)
            return
        yield reply.index, reply.delta(output)
        reason = FinishReason.STOP if reply.is_stopped else output.finish_reason
        if reason is not None:
            del replies[output.request_id]
            self._end(output.request_id, reason)
            yield reply.index, reply.finished(reason)

    def score(
        self, token_ids: Sequence[int], num_top: int = 0, on_logits: Callable[[int, Tensor], None] | None = None
    ) -> Score:
        """Logprobs of a text's own tokens. on_logits: called with (first position, logits [rows, vocab]) by chunk."""
        sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=num_top)
        request_id = f"local-{next(self._ids)}"
        self.engine.add(EngineRequest(request_id, token_ids, sampling, on_prompt_logits=on_logits))
        self._outputs[request_id] = deque()
        try:
            while not (taken := self._take((request_id,))):
                pass
        finally:
            self._end(request_id, FinishReason.ABORTED)
        _, output = taken[0]
        if output.error is not None:
            raise output.error
        return Score(tuple(token_ids), output.prompt_logprobs)


class LocalSession:
    """A conversation. Its journal, and the lease of the turn that runs, are a session store's, as in a cluster."""

    def __init__(self, pipeline: LocalPipeline, encoder: ChatEncoder, tenant_salt: bytes) -> None:
        self._pipeline = pipeline
        self._encoder = encoder
        self._tenant_salt = tenant_salt
        self._store = MemorySessionStore()
        made = self._store.create(
            REPLICA, None, model=REPLICA, ttl_s=MAX_TTL_S, template_digest=encoder.template_digest
        )
        self.session_id = at_once(made).session_id

    @property
    def num_turns(self) -> int:
        return at_once(self._store.get(REPLICA, self.session_id)).num_turns

    @property
    def history(self) -> list[int]:
        """All token ids, as sampled. Raises SessionBusy while a turn runs."""
        acquired = self._acquire()
        at_once(self._store.release(acquired.lease))
        return _token_ids(acquired)

    def turn(self, messages: Sequence[Message], sampling: SamplingParams) -> Generator[Delta | Finished]:
        """One turn. What was generated joins the history, also if the iterator is closed early.

        Raises SessionBusy if another turn has begun and not ended, and what `LocalPipeline.run` raises.
        """
        acquired = self._acquire()
        reply: list[int] = []
        reason = FinishReason.ABORTED
        try:
            history = _token_ids(acquired)
            new = self._encoder.encode_turn(
                messages,
                is_first_turn=not acquired.turns,
                previous_turn_ended_with_eos=bool(history) and history[-1] in self._pipeline.engine.eos_token_ids,
            )
            request = LocalRequest([*history, *new], sampling, self._tenant_salt)
            with closing(self._pipeline.run([request])) as events:
                for _, event in events:
                    if isinstance(event, Delta):
                        reply += event.token_ids
                    else:
                        reason = event.reason
                    yield event
        finally:
            if reply:
                record = TurnRecord(tuple(new), tuple(reply), reason, self._encoder.template_digest)
                at_once(self._store.commit(acquired.lease, record, ()))
            else:
                at_once(self._store.release(acquired.lease))

    def _acquire(self) -> Acquired:
        acquired = at_once(self._store.acquire(REPLICA, self.session_id, TurnStart(), lease_ttl_s=MAX_TTL_S))
        assert isinstance(acquired, Acquired), "no turn has an idempotency key"
        return acquired


def _token_ids(acquired: Acquired) -> list[int]:
    """Of all turns so far."""
    turns = acquired.turns
    return [token_id for turn in turns for ids in (turn.prompt_token_ids, turn.generated_token_ids) for token_id in ids]
