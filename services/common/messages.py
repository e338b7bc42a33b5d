"""What travels between the parts of the cluster: turns and their events, routing, the origins of KV, sessions.

Plain frozen data, no behaviour beyond validation. The engine's part of a request is in sampling.py.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from services.common.errors import InvalidRequest
from services.common.sampling import FinishReason, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. role: system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one turn. num_cached_tokens: prompt tokens whose KV was not computed again."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int


class RoutingReason(enum.Enum):
    """Why a turn went to the replica it went to."""

    HELD_PREFIX = "held_prefix"  # the replica holds the longest part of the history, and that wins over its load
    NO_HOLDER = "no_holder"  # nobody holds any of it: the cheapest replica
    HOLDER_OVERLOADED = "holder_overloaded"  # the holder is so busy that moving is cheaper
    HOLDER_GONE = "holder_gone"  # the holder has left the registry
    CONSISTENT_HASH = "consistent_hash"  # the baseline policy: session -> replica by hash
    RANDOM = "random"  # the baseline policy
    RESUMED = "resumed"  # the replica that ran the turn was lost; another one goes on


class KvSource(enum.Enum):
    """Where the KV of a run of prompt tokens came from."""

    LOCAL = "local"  # blocks that stood in the decode replica's own pool
    FETCHED = "fetched"  # blocks of the history fetched from another replica
    PREFILL = "prefill"  # computed by a prefill replica, then fetched
    COMPUTED = "computed"  # computed by the decode replica itself


class PrefillPlace(enum.Enum):
    """Where the missing prompt tokens were computed."""

    DECODE = "decode"  # by the decode replica itself
    PREFILL = "prefill"  # by a prefill replica


@dataclass(frozen=True, slots=True)
class Candidate:
    """A decode replica as the router saw it. cost_ms: expected time to the first token there; the lowest wins.

    num_held_tokens: leading prompt tokens whose KV it is believed to hold. note: why it was passed over, if it was.
    """

    replica: str
    num_held_tokens: int
    num_running_tokens: int
    num_waiting_tokens: int
    num_free_blocks: int
    cost_ms: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """The replica chosen for a turn, why, and what it was chosen from. detail: one sentence for people."""

    replica: str
    reason: RoutingReason
    detail: str = ""
    policy: str = "cost"
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class KvOrigin:
    """Origin of the KV of `num_tokens` prompt tokens; the origins of a turn stand in order of position.

    replica: the one that held or computed them.
    """

    source: KvSource
    replica: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """What a turn spent where, in milliseconds; a stage that did not happen is 0.

    first_token_ms counts from the arrival of the request at the gateway to its first token, and total_ms to its end;
    queue_ms, transfer_ms, prefill_ms and decode_ms are the decode replica's. transfer_bytes: KV bytes received.
    replica_first_token_ms: from the turn's arrival at the decode replica to its first token there.
    """

    session_ms: float = 0.0
    tokenize_ms: float = 0.0
    route_ms: float = 0.0
    queue_ms: float = 0.0
    transfer_ms: float = 0.0
    transfer_bytes: int = 0
    prefill_ms: float = 0.0
    first_token_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0
    replica_first_token_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """One turn, as the gateway's edge hands it to the pipeline.

    tenant: from the caller's token, never from the body. session: its id, None for a turn that leaves nothing behind.
    Exactly one of messages (the new ones only) and token_ids (raw prompt) is given. deadline_s: on time.monotonic().
    """

    tenant: str
    request_id: str
    session: str | None = None
    messages: tuple[Message, ...] = ()
    token_ids: tuple[int, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    idempotency_key: str | None = None
    deadline_s: float | None = None
    traceparent: str | None = None

    def __post_init__(self) -> None:
        if bool(self.messages) == bool(self.token_ids):
            raise InvalidRequest("input", "exactly one of chat messages and token ids is needed, and not empty")


@dataclass(frozen=True, slots=True)
class Started:
    """First event of every turn. turn counts from 1 within the session; 0 without one.

    num_cached_tokens: prompt tokens whose KV the chosen replica, or one it can fetch from, is believed to hold.
    """

    request_id: str
    session: str | None
    turn: int
    num_prompt_tokens: int
    num_cached_tokens: int
    routing: RoutingDecision


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of the reply. index: position in the reply of the first of token_ids.

    text may lag behind token_ids (whole characters only, and a possible stop string is held back).
    logprobs: one a token if asked for. prompt_logprobs: in the first delta only, one a prompt token from the second on.
    """

    text: str
    token_ids: tuple[int, ...]
    index: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of a turn that ended well. kv_origins: of the prompt's KV, by position.

    prefill_place and prefill_reason: where the missing prompt tokens were computed, and why there.
    num_resumes: how many times the turn went on at another replica.
    """

    reason: FinishReason
    usage: Usage
    timings: Timings
    replica: str
    kv_origins: tuple[KvOrigin, ...] = ()
    prefill_place: PrefillPlace = PrefillPlace.DECODE
    prefill_reason: str = ""
    num_resumes: int = 0


TurnEvent = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class Explanation:
    """A dry run of routing: what would happen to the turn now."""

    routing: RoutingDecision
    num_prompt_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class SessionHolder:
    """A replica that holds a session's blocks up to num_computed_tokens. tier: gpu, cpu or disk."""

    replica: str
    num_computed_tokens: int
    tier: str = "gpu"


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as its owner sees it. Times are seconds since the epoch; ttl_s counts from the last turn.

    active_turn: the number of the turn that runs now, None if none does. held_bytes: of its journal, in the store.
    """

    session: str
    model: str
    created_at_s: float
    updated_at_s: float
    ttl_s: float
    num_turns: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    holders: tuple[SessionHolder, ...] = ()
    held_bytes: int = 0
    active_turn: int | None = None


@dataclass(frozen=True, slots=True)
class SessionPage:
    """One page of a list of sessions. next_page_token: empty on the last page."""

    sessions: tuple[SessionInfo, ...]
    next_page_token: str = ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that is served. kv_token_bytes: cache bytes one token takes, all layers together.

    default_sampling: of requests that say nothing else; the checkpoint's own.
    """

    name: str
    dtype: str
    cache_mode: str
    max_seq_len: int
    vocab_size: int
    block_size: int
    num_layers: int
    kv_token_bytes: int
    fingerprint: str
    default_sampling: SamplingParams = field(default_factory=SamplingParams)
