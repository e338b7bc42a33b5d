"""What a decision rests on: the cluster at one moment, as numbers. Nothing in here knows Ray or Redis."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class Kind(enum.Enum):
    """The deployments that are scaled; the values are their names."""

    GATEWAY = "gateway"
    TOKENIZER = "tokenizer"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A prefill or decode replica at its last report. Rates are tokens a second, None until measured.

    num_free_blocks counts those that hold the KV of idle sessions and could be evicted: num_session_blocks of them, of
    num_idle_sessions sessions that had a turn not long ago.
    """

    replica_id: str
    num_blocks: int
    num_free_blocks: int
    block_size: int
    block_bytes: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    transfer_bytes_per_s: float | None = None
    num_session_blocks: int = 0
    num_idle_sessions: int = 0
    is_draining: bool = False

    @property
    def num_sequences(self) -> int:
        """Running and waiting."""
        return self.num_running + self.num_waiting

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - self.num_free_blocks


@dataclass(frozen=True, slots=True)
class HelperLoad:
    """A gateway or tokenizer replica. num_cpus: cores that it keeps busy; num_calls: turns or calls in flight."""

    num_cpus: float
    num_calls: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The cluster at now_s (seconds of a clock that only goes forward).

    targets: how many replicas of each kind have been asked for so far; a kind that is missing is not scaled.
    prefill_demand_tokens_per_s: prompt tokens that prefill replicas computed lately. num_refused_blocks: KV blocks of
    turns that decode replicas had no room for lately.
    """

    now_s: float
    targets: Mapping[Kind, int]
    prefill: Sequence[WorkerLoad] = ()
    decode: Sequence[WorkerLoad] = ()
    gateway: Sequence[HelperLoad] = ()
    tokenizer: Sequence[HelperLoad] = ()
    prefill_demand_tokens_per_s: float = 0.0
    num_refused_blocks: int = 0
