"""What replicas ask of each other, and how: history from whoever holds it, prompts from a prefill replica.

Both calls are context managers: the blocks that come with the answer stay published while the context is open, and
leaving it is the acknowledgement. So a replica that drains waits for its readers, and one whose reader is cancelled
gets its blocks back at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from services.common.sampling import SamplingParams, TokenLogprobs
from services.transfer.base import Identity, KVTicket

# A prefill replica that computes says so this often: a prompt may take long, a replica that hangs says nothing.
PING_S = 1.0


@dataclass(frozen=True, slots=True)
class HistoryRequest:
    """Asks a holder for the KV of token_ids from first_token (a block's first) on.

    holder: the very process that is meant; another one offers nothing. token_ids: from position 0 on, because the
    holder finds blocks by their prefix hash. into_block_ids: where they go, one a block that is wanted. moved_session:
    the digest of the session that goes on at the asker, so that the holder's copy is of no use any more; empty if none.
    """

    holder: Identity
    token_ids: tuple[int, ...]
    salt: bytes
    first_token: int
    into_block_ids: tuple[int, ...]
    moved_session: str


@dataclass(frozen=True, slots=True)
class HistoryOffer:
    """Answer to a HistoryRequest: as many leading blocks of the wanted ones as the holder has; None if it has none."""

    ticket: KVTicket | None


@dataclass(frozen=True, slots=True)
class PrefillRequest:
    """Asks for the KV of prompt and resumed tokens, and for the token that comes next.

    resumed_token_ids: reply tokens that exist already; they follow the prompt and count as generated. holder: holds the
    KV of the first num_held_tokens (full blocks), and wants that of the rest; into_block_ids: where it puts it.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    resumed_token_ids: tuple[int, ...]
    salt: bytes
    sampling: SamplingParams
    holder: Identity
    num_held_tokens: int
    into_block_ids: tuple[int, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Everything whose KV is needed."""
        return self.prompt_token_ids + self.resumed_token_ids


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """The next token, and a ticket for the KV that the asker lacks.

    is_stop: the token ends the reply. num_cached_tokens: leading tokens whose KV this replica had or fetched.
    transfer_*: of the history it fetched; prefill_ms: from then to the token, its own queue included.
    """

    replica: Identity
    token_id: int
    logprobs: TokenLogprobs | None
    is_stop: bool
    ticket: KVTicket
    num_cached_tokens: int
    prefill_ms: float
    transfer_ms: float = 0.0
    transfer_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    """The prefill replicas at their last heartbeats.

    num_waiting_tokens: at the least busy one. prefill_tokens_per_s: their mean, None until one has measured.
    """

    num_replicas: int
    num_waiting_tokens: int
    prefill_tokens_per_s: float | None


class HistoryClient(Protocol):
    """Reaches the replicas that hold history."""

    def history(self, request: HistoryRequest) -> AbstractAsyncContextManager[HistoryOffer]:
        """What request.holder offers; published until the context ends. Raises Unavailable or TransferFailed."""
        ...


class PrefillClient(Protocol):
    """Reaches the prefill replicas."""

    def load(self) -> PrefillLoad | None:
        """How busy they are; None if there are none."""
        ...

    def run(self, request: PrefillRequest) -> AbstractAsyncContextManager[PrefillResult]:
        """What one of them computed; its ticket can be fetched until the context ends.

        Raises Unavailable if the replica is lost (another may do), or what the replica raised.
        """
        ...


def blocks_between(table: Sequence[int], first_token: int, end_token: int, block_size: int) -> tuple[int, ...]:
    """The blocks of a table that hold tokens first_token (a block's first) to end_token, exclusive."""
    return tuple(table[first_token // block_size : -(-end_token // block_size)])
