"""The whole pipeline in one process: text in, text out, no Ray, no Redis, no gRPC.

A library for scripts, what the command line runs without a cluster, and the oracle of the cluster's tests.

    pipeline = LocalPipeline.load(ModelSettings(), EngineSettings())
    session = pipeline.session()
    for event in session.turn([Message("user", "Tell me a story.")], SamplingParams(temperature=0)):
        ...

One turn: encode the new messages, generate, detokenize, append to the history. The history is token ids as sampled and
is never rendered again, so the blocks of the turns before are found, not computed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from torch import Tensor

from services.common.errors import AntiphonError, InvalidCheckpoint, InvalidRequest, QueueFull
from services.common.messages import Delta, Finished, Message, Timings, Usage
from services.common.sampling import FinishReason, SamplingParams, TokenLogprobs
from services.common.settings import EngineSettings, ModelSettings
from services.engine.engine import Engine, EngineOutput, EngineRequest
from services.engine.hub import resolve_model
from services.engine.loading import load_engine
from services.engine.weights import Progress
from services.text.chat_template import ChatEncoder
from services.text.detokenizer import Detokenizer
from services.text.tokenizer import Tokenizer

REPLICA = "local"
OnError = Callable[[int, AntiphonError], None] | None


@dataclass(frozen=True, slots=True)
class LocalRequest:
    """A prompt as token ids, and how to go on."""

    token_ids: Sequence[int]
    sampling: SamplingParams
    tenant_salt: bytes = b""


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
        replies: dict[str, _Reply] = {}
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

    def _add(self, index: int, request: LocalRequest, replies: dict[str, _Reply], on_error: OnError) -> bool:
        """Whether the request is off the list: the engine has room for it, or it cannot be served."""
        request_id = f"local-{next(self._ids)}"
        try:
            reply = _Reply(index, request, self.tokenizer)
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
        self, output: EngineOutput, replies: dict[str, _Reply], on_error: OnError
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
    """A conversation. `history` is its journal: all token ids, as sampled."""

    def __init__(self, pipeline: LocalPipeline, encoder: ChatEncoder, tenant_salt: bytes) -> None:
        self.history: list[int] = []
        self.num_turns = 0
        self._pipeline = pipeline
        self._encoder = encoder
        self._tenant_salt = tenant_salt

    def turn(self, messages: Sequence[Message], sampling: SamplingParams) -> Generator[Delta | Finished]:
        """One turn. What was generated joins the history, also if the iterator is closed early."""
        eos = self._pipeline.engine.eos_token_ids
        new = self._encoder.encode_turn(
            messages,
            is_first_turn=self.num_turns == 0,
            previous_turn_ended_with_eos=bool(self.history) and self.history[-1] in eos,
        )
        prompt = [*self.history, *new]
        reply: list[int] = []
        try:
            with closing(self._pipeline.run([LocalRequest(prompt, sampling, self._tenant_salt)])) as events:
                for _, event in events:
                    if isinstance(event, Delta):
                        reply += event.token_ids
                    yield event
        finally:
            if reply:
                self.history = prompt + reply
                self.num_turns += 1


@dataclass(slots=True)
class _Reply:
    """A reply on its way: text out of tokens, and the clock."""

    index: int
    request: LocalRequest
    tokenizer: Tokenizer | None
    num_tokens: int = 0
    num_cached_tokens: int = 0
    first_token_s: float = 0.0
    started_s: float = field(default_factory=time.perf_counter)
    detokenizer: Detokenizer | None = field(init=False)

    def __post_init__(self) -> None:
        stop = self.request.sampling.stop
        if stop and self.tokenizer is None:
            raise InvalidRequest("sampling.stop", "stop strings need a tokenizer, and this checkpoint has none")
        self.detokenizer = None if self.tokenizer is None else Detokenizer(self.tokenizer, stop)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has been found."""
        return self.detokenizer is not None and self.detokenizer.stopped

    def delta(self, output: EngineOutput) -> Delta:
        if self.num_tokens == 0:
            self.first_token_s = time.perf_counter()
            self.num_cached_tokens = output.num_cached_tokens
        index = self.num_tokens
        self.num_tokens += len(output.token_ids)
        text = ""
        if self.detokenizer is not None:
            text = self.detokenizer.push(output.token_ids)
            if output.finish_reason is not None:
                text += self.detokenizer.finish()
        return Delta(text, output.token_ids, index, output.logprobs, output.prompt_logprobs)

    def finished(self, reason: FinishReason) -> Finished:
        now_s = time.perf_counter()
        timings = Timings(
            first_token_ms=(self.first_token_s - self.started_s) * 1e3,
            decode_ms=(now_s - self.first_token_s) * 1e3,
            total_ms=(now_s - self.started_s) * 1e3,
        )
        usage = Usage(len(self.request.token_ids), self.num_cached_tokens, self.num_tokens)
        return Finished(reason, usage, timings, REPLICA)
