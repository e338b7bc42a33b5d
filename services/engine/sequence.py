"""The engine's unit of work: tokens, the blocks that hold their KV, and how far both have come."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable

from services.common.prefix_hash import PrefixHasher
from services.common.sampling import FinishReason, SamplingParams


class SequenceStatus(enum.Enum):
    """Where a sequence stands in the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A prompt and what is generated after it.

    token_ids: prompt and generated tokens. The KV of the first `num_computed_tokens` of them is in the blocks of
    `block_table`; after a step a sequence that generates has exactly one uncomputed token, the one sampled last.
    block_hashes: prefix hashes of the full blocks of token_ids, computed or not.
    num_cached_tokens: tokens whose KV was found, not computed, when the sequence first got its blocks.
    reuses_prefix: False computes every token again, for a caller that wants the logits of the prompt.
    keeps_blocks: when the sequence stops by itself its blocks stay referenced; the caller releases `block_table`.
    max_seq_len: most tokens it may grow to; the scheduler lowers it to what it can serve.

    While it is in a scheduler, only the scheduler changes it.
    """

    __slots__ = (
        "arrival",
        "block_hashes",
        "block_table",
        "eos_token_ids",
        "finish_reason",
        "hasher",
        "keeps_blocks",
        "max_seq_len",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "reuses_prefix",
        "sampling",
        "seq_id",
        "status",
        "token_ids",
    )

    def __init__(
        self,
        seq_id: str,
        prompt_token_ids: Iterable[int],
        sampling: SamplingParams,
        hasher: PrefixHasher,
        *,
        eos_token_ids: Iterable[int] = (),
        max_seq_len: int = sys.maxsize,
        keeps_blocks: bool = False,
    ) -> None:
        self.seq_id = seq_id
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.sampling = sampling
        self.hasher = hasher
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_seq_len = max_seq_len
        self.reuses_prefix = sampling.prompt_logprobs is None
        self.keeps_blocks = keeps_blocks
        self.block_hashes = hasher.hashes(self.token_ids)
        self.block_table: list[int] = []
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.arrival = 0
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.token_ids)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens after the prompt."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose KV does not exist yet."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def generated_token_ids(self) -> list[int]:
        """A copy of the tokens after the prompt."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def append(self, token_id: int) -> None:
        """Adds a generated token, here or (a reply that goes on after a failure) before the sequence is scheduled."""
        self.token_ids.append(token_id)
        if len(self.token_ids) % self.hasher.block_size == 0:
            self.hasher.extend(self.block_hashes, self.token_ids)

    def finish_reason_after(self, token_id: int) -> FinishReason | None:
        """Why the sequence ends once `token_id` is appended (which it is not yet), or None if it goes on."""
        sampling = self.sampling
        if token_id in self.eos_token_ids and not sampling.ignore_eos:
            return FinishReason.STOP
        if token_id in sampling.stop_token_ids:
            return FinishReason.STOP
        if sampling.max_tokens is not None and self.num_generated_tokens + 1 >= sampling.max_tokens:
            return FinishReason.LENGTH
        if len(self.token_ids) + 1 >= self.max_seq_len:
            return FinishReason.LENGTH
        return None

    def goes_on_whatever_is_sampled(self) -> bool:
        """Whether neither limit ends the sequence with the next token; an end token still may."""
        max_tokens = self.sampling.max_tokens
        is_last = max_tokens is not None and self.num_generated_tokens + 1 >= max_tokens
        return not is_last and len(self.token_ids) + 1 < self.max_seq_len

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id!r}, {self.status.value}, {self.num_computed_tokens}/{len(self.token_ids)} tokens"
            f" computed, {len(self.block_table)} blocks)"
        )
