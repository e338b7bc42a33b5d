"""A prompt for the engine of this process, and its reply on the way out: text out of tokens, and the clock."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.common.errors import InvalidRequest
from services.common.messages import Delta, Finished, Timings, Usage
from services.common.sampling import FinishReason, SamplingParams
from services.engine.engine import EngineOutput
from services.text.detokenizer import Detokenizer
from services.text.tokenizer import Tokenizer

REPLICA = "local"


@dataclass(frozen=True, slots=True)
class LocalRequest:
    """A prompt as token ids, and how to go on."""

    token_ids: Sequence[int]
    sampling: SamplingParams
    tenant_salt: bytes = b""


@dataclass(slots=True)
class LocalReply:
    """One reply while it comes. index: of its request. Raises InvalidRequest if stop strings cannot be found."""

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
