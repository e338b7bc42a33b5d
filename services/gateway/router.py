"""Which decode replica runs a turn, and why: a pure function of what the registry, the session and the gateway know.

The cost of a replica is the time to the turn's first token there, in milliseconds:

    wait       tokens that stand before the turn / prefill rate, and half a step of the sequences that run
    transfer   bytes of history that another replica holds and this one lacks / measured transfer rate
    prefill    tokens that nobody holds / prefill rate
    memory     tokens that others will have to compute again / prefill rate: grows as the blocks that are free, and not
               full of what idle sessions will want again, run short of what the turn needs
    moving     for all but the holder of the longest prefix: what has to be gained for leaving it. Loads are a heartbeat
               old, and a session that moves takes memory twice

Ties go to the replica with the longest prefix, then the lower load. Rates are the mean of what the replicas measured:
what one of them computed last says more about its last prompt than about the replica. Those that nobody has measured
yet are assumed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.common.errors import Unavailable
from services.common.messages import Candidate, RoutingDecision, RoutingReason
from services.common.settings import RoutingSettings
from services.sessions.base import Holder
from services.sessions.registry import ReplicaRecord

ASSUMED_PREFILL_TOKENS_PER_S = 2000.0
ASSUMED_DECODE_TOKENS_PER_S = 200.0
ASSUMED_TRANSFER_BYTES_PER_S = 2e9
TRANSFER_OVERHEAD_MS = 15.0
MIN_GAIN_MS = 30.0  # of moving a session, and a third of what it would cost to stay
MIN_GAIN_FRACTION = 1 / 3


@dataclass(frozen=True, slots=True)
class RoutingQuestion:
    """What is asked of the router.

    session_digest: the same for every turn of a session (the hash policy's key). num_prompt_tokens: history and new
    ones. kv_token_bytes: cache bytes of one token. pending_tokens: prompt tokens that this gateway has sent to each
    replica and that still wait for their first token. excluded: replicas that have just failed or refused this turn,
    and which of the two.
    """

    session_digest: str
    num_prompt_tokens: int
    holders: Sequence[Holder] = ()
    kv_token_bytes: int = 0
    pending_tokens: Mapping[str, int] | None = None
    excluded: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class LiveHolder:
    """A holder whose very process is registered, or its heir in its place. address: of its DecodeService."""

    holder: Holder
    address: str


@dataclass(frozen=True, slots=True)
class Route:
    """The decision, the chosen replica's record, and the holders that live, longest prefix first.

    num_held_tokens: leading prompt tokens whose KV the chosen replica is believed to hold. num_cached_tokens: those
    that it holds or can fetch.
    """

    decision: RoutingDecision
    record: ReplicaRecord
    live_holders: tuple[LiveHolder, ...]
    num_held_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class _Scored:
    record: ReplicaRecord
    num_held_tokens: int
    load_tokens: int
    cost_ms: float

    def candidate(self, note: str = "") -> Candidate:
        """As people and clients see it."""
        record = self.record
        return Candidate(
            record.replica_id,
            self.num_held_tokens,
            record.num_running_tokens,
            record.num_waiting_tokens,
            record.num_free_blocks,
            round(self.cost_ms, 3),
            note,
        )


def choose(
    question: RoutingQuestion,
    records: Sequence[ReplicaRecord],
    settings: RoutingSettings,
    rng: random.Random | None = None,
) -> Route:
    """The replica for a turn. Raises Unavailable if no decode replica is there to take it.

    Changes nothing, so a dry run is the same call. rng: for policy random.
    """
    holders = live_holders(question.holders, records)
    # The last prompt token is always computed: its logits give the first token of the reply.
    most = question.num_prompt_tokens - 1
    held = {each.holder.replica_id: min(each.holder.num_computed_tokens, most) for each in holders}
    best_held = max(held.values(), default=0)
    notes = {record.replica_id: _why_not(record, question) for record in records}
    scored = _scores(question, records, held, settings)
    usable = [each for each in scored if not notes[each.record.replica_id]]
    if not usable:
        raise Unavailable("no decode replica can take the turn now")
    if settings.policy == "cost":
        chosen = min(usable, key=_preference)
    elif settings.policy == "consistent_hash":
        chosen = max(usable, key=lambda each: _rendezvous(question.session_digest, each.record.replica_id))
    else:
        chosen = (rng or random.Random()).choice(usable)
    reason, detail = _reason(chosen, usable, question, holders, settings)
    decision = RoutingDecision(
        chosen.record.replica_id,
        reason,
        detail,
        settings.policy,
        tuple(each.candidate(notes[each.record.replica_id]) for each in scored),
    )
    return Route(decision, chosen.record, holders, chosen.num_held_tokens, best_held)


def live_holders(holders: Sequence[Holder], records: Sequence[ReplicaRecord]) -> tuple[LiveHolder, ...]:
    """The holders whose very process is registered, or their heirs, longest prefix first."""
    by_process = {(record.replica_id, record.incarnation): record for record in records}
    last_heirs_last = sorted(records, key=lambda record: not record.is_draining)
    heirs = {incarnation: record for record in last_heirs_last for incarnation in record.inherits}
    living: dict[str, LiveHolder] = {}
    for holder in holders:
        # A replica that drains hands over what it holds, and nobody reaches it any more.
        record = heirs.get(holder.incarnation) or by_process.get((holder.replica_id, holder.incarnation))
        if record is None:
            continue
        known = living.get(record.replica_id)
        if known is None or known.holder.num_computed_tokens < holder.num_computed_tokens:
            named = dataclasses.replace(holder, replica_id=record.replica_id, incarnation=record.incarnation)
            living[record.replica_id] = LiveHolder(named, record.address)
    return tuple(sorted(living.values(), key=lambda each: (-each.holder.num_computed_tokens, each.holder.replica_id)))


def _why_not(record: ReplicaRecord, question: RoutingQuestion) -> str:
    if record.is_draining:
        return "is draining"
    return (question.excluded or {}).get(record.replica_id, "")


@dataclass(frozen=True, slots=True)
class _Rates:
    """Of a typical replica."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    transfer_bytes_per_s: float

    @classmethod
    def of(cls, records: Sequence[ReplicaRecord]) -> _Rates:
        return cls(
            _mean([record.prefill_tokens_per_s for record in records], ASSUMED_PREFILL_TOKENS_PER_S),
            _mean([record.decode_tokens_per_s for record in records], ASSUMED_DECODE_TOKENS_PER_S),
            _mean([record.transfer_bytes_per_s for record in records], ASSUMED_TRANSFER_BYTES_PER_S),
        )


def _mean(rates: Sequence[float | None], assumed: float) -> float:
    measured = [rate for rate in rates if rate]
    return sum(measured) / len(measured) if measured else assumed


def _scores(
    question: RoutingQuestion, records: Sequence[ReplicaRecord], held: Mapping[str, int], settings: RoutingSettings
) -> list[_Scored]:
    rates, best_held = _Rates.of(records), max(held.values(), default=0)
    scored = [
        _score(record, question, held.get(record.replica_id, 0), best_held, rates, settings) for record in records
    ]
    to_stay_ms = [each.cost_ms for each in scored if each.num_held_tokens == best_held]
    if not best_held or not to_stay_ms:
        return scored
    moving_ms = max(MIN_GAIN_MS, MIN_GAIN_FRACTION * min(to_stay_ms))
    return [
        each if each.num_held_tokens == best_held else dataclasses.replace(each, cost_ms=each.cost_ms + moving_ms)
        for each in scored
    ]


def _score(
    record: ReplicaRecord,
    question: RoutingQuestion,
    num_held: int,
    best_held: int,
    rates: _Rates,
    settings: RoutingSettings,
) -> _Scored:
    prefill_rate = rates.prefill_tokens_per_s
    # What a heartbeat says is part of what was sent, or the other way round: their sum would count it twice.
    waiting = max(record.num_waiting_tokens, (question.pending_tokens or {}).get(record.replica_id, 0))
    wait_ms = (waiting / prefill_rate + record.num_running / rates.decode_tokens_per_s / 2) * 1e3
    num_fetched = max(best_held - num_held, 0)
    fetch_ms = (
        TRANSFER_OVERHEAD_MS + num_fetched * question.kv_token_bytes / rates.transfer_bytes_per_s * 1e3
        if num_fetched
        else 0.0
    )
    num_missing = question.num_prompt_tokens - num_held - num_fetched
    prefill_ms = num_missing / prefill_rate * 1e3
    needed_blocks = -(-(question.num_prompt_tokens - num_held) // record.block_size)
    num_short = max(needed_blocks - max(record.num_free_blocks - record.num_session_blocks, 0), 0)
    memory_ms = num_short * record.block_size / prefill_rate * 1e3
    cost_ms = (
        settings.queue_weight * wait_ms
        + settings.transfer_weight * fetch_ms
        + prefill_ms
        + settings.memory_weight * memory_ms
    )
    return _Scored(record, num_held, waiting + record.num_running_tokens, cost_ms)


def _preference(scored: _Scored) -> tuple[float, int, int, str]:
    return (round(scored.cost_ms, 3), -scored.num_held_tokens, scored.load_tokens, scored.record.replica_id)


def _rendezvous(key: str, replica_id: str) -> bytes:
    """Highest random weight (Thaler, Ravishankar 1996): a replica that leaves moves its own sessions only."""
    return hashlib.blake2b(f"{key}\0{replica_id}".encode(), digest_size=8).digest()


def _reason(
    chosen: _Scored,
    usable: Sequence[_Scored],
    question: RoutingQuestion,
    holders: Sequence[LiveHolder],
    settings: RoutingSettings,
) -> tuple[RoutingReason, str]:
    """Why the choice fell as it did, for programs and for people."""
    name, held = chosen.record.replica_id, chosen.num_held_tokens
    if settings.policy == "consistent_hash":
        return RoutingReason.CONSISTENT_HASH, f"the session's hash points to {name}"
    if settings.policy == "random":
        return RoutingReason.RANDOM, f"{name} was drawn"
    best = max(usable, key=lambda each: each.num_held_tokens)
    prompt = question.num_prompt_tokens
    if held and held >= best.num_held_tokens:
        return RoutingReason.HELD_PREFIX, f"{name} holds {held} of {prompt} tokens: {chosen.cost_ms:.1f} ms"
    if best.num_held_tokens:
        other = (
            f"{best.record.replica_id} holds {best.num_held_tokens} of {prompt} tokens but costs {best.cost_ms:.1f} ms"
        )
        return RoutingReason.HOLDER_OVERLOADED, f"{other}; {name} costs {chosen.cost_ms:.1f} ms"
    if holders:  # it lives, and may not be used
        name = holders[0].holder.replica_id
        note = (question.excluded or {}).get(name) or "is draining"
        return RoutingReason.HOLDER_OVERLOADED, f"{name} holds the history and {note}"
    if question.holders:
        gone = question.holders[0].replica_id
        return RoutingReason.HOLDER_GONE, f"{gone} has left with the history; {name} is the cheapest"
    return RoutingReason.NO_HOLDER, f"nobody holds any of it; {name} is the cheapest: {chosen.cost_ms:.1f} ms"
