"""The reply of one turn while it grows: its tokens, their text, where it ends, and what the replica said of it."""

from __future__ import annotations

from collections.abc import Collection

from services.common.errors import Unavailable
from services.common.messages import Delta, KvOrigin, KvSource, PrefillPlace, Timings
from services.common.sampling import FinishReason, SamplingParams
from services.pb.antiphon.internal.v1 import decode_service_pb2 as pb
from services.text.detokenizer import Detokenizer
from services.text.tokenizer import Tokenizer
from services.wire import values


class Reply:
    """Grows by chunks, whichever replica they come from; is complete once `finish_reason` is set.

    Attributes: token_ids (of the reply so far), num_computed_tokens (of prompt and reply, held by the replica that
    ended it), num_cached_tokens, kv_origins, prefill_place, prefill_reason, timings (the replica's).
    """

    def __init__(self, num_prompt_tokens: int, sampling: SamplingParams, tokenizer: Tokenizer) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._sampling = sampling
        self._ending_ids: Collection[int] = {
            *sampling.stop_token_ids,
            *(() if sampling.ignore_eos else tokenizer.eos_token_ids),
        }
        self._detokenizer = Detokenizer(tokenizer, sampling.stop)
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.kv_origins: tuple[KvOrigin, ...] = ()
        self.prefill_place = PrefillPlace.DECODE
        self.prefill_reason = ""
        self.timings = Timings()

    @property
    def is_complete(self) -> bool:
        """No more tokens belong to it."""
        return self.finish_reason is not None

    @property
    def has_stopped(self) -> bool:
        """A stop string was found."""
        return self._detokenizer.stopped

    def admitted(self, message: pb.Admitted, replica: str) -> None:
        """A replica begins. What it says here stands if the reply ends before it says more."""
        self.num_cached_tokens = message.num_cached_tokens
        if message.num_cached_tokens:
            self.kv_origins = (KvOrigin(KvSource.LOCAL, replica, message.num_cached_tokens),)

    def push(self, chunk: pb.TokenChunk) -> Delta:
        """The next tokens. Raises Unavailable if they are not the next ones: there is no gap and no repeat."""
        index = len(self.token_ids)
        if chunk.index != index:
            raise Unavailable(f"token {chunk.index} of a reply came in place of token {index}")
        before = self._detokenizer.num_tokens_used
        text = self._detokenizer.push(chunk.token_ids)
        num_new = self._detokenizer.num_tokens_used - before
        new_ids = tuple(chunk.token_ids[:num_new])
        self.token_ids += new_ids
        if self._detokenizer.stopped:
            self._end_at_stop_string()
        logprobs = values.logprobs_from_proto(chunk.logprobs[:num_new])
        prompt_logprobs = values.logprobs_from_proto(chunk.prompt_logprobs)
        return Delta(text, new_ids, index, logprobs, prompt_logprobs)

    def finished(self, message: pb.Finished) -> None:
        """The replica has ended it, and says how it went."""
        if not self.has_stopped:
            self.finish_reason = values.FINISH_REASONS.member(message.reason, "finished.reason")
        # After a stop string the replica may be some tokens ahead. The last token is sampled, not yet computed.
        most = self._num_prompt_tokens + len(self.token_ids) - 1
        self.num_computed_tokens = min(message.num_computed_tokens, most)
        self.num_cached_tokens = message.usage.num_cached_tokens
        self.kv_origins = values.origins_from_proto(message.kv_origins)
        self.prefill_place = values.PREFILL_PLACES.member(message.prefill_place, "finished.prefill_place")
        self.prefill_reason = message.prefill_reason
        self.timings = values.timings_from_proto(message.timings)

    def end_if_nothing_is_left(self) -> None:
        """Ends it where the last token has ended it already: its replica was lost just before it could say so."""
        if self.token_ids and self.token_ids[-1] in self._ending_ids:
            self.finish_reason = FinishReason.STOP
        elif len(self.token_ids) == self._sampling.max_tokens:
            self.finish_reason = FinishReason.LENGTH

    def rest(self) -> Delta | None:
        """The text that was held back, once the reply is complete; None if there is none."""
        text = self._detokenizer.finish()
        return Delta(text, (), len(self.token_ids)) if text else None

    def _end_at_stop_string(self) -> None:
        self.finish_reason = FinishReason.STOP
        self.prefill_reason = "the reply ended at a stop string, before the replica's own account of it"
        # The last token is sampled, not yet computed; the engine may be a step ahead, which does no harm.
        self.num_computed_tokens = self._num_prompt_tokens + len(self.token_ids) - 1
