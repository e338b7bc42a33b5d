"""Where the missing KV of a prompt comes from: a comparison of times, from rates that were measured.

    here      this replica computes it; what else runs here is held up meanwhile
    prefill   a prefill replica computes it and hands it over; it fetches the history it lacks from here
    history   before either, part of it can be fetched from another replica that holds it

The plan is the cheapest way to the first token. Nothing here is a fixed threshold: with no rate measured yet the
replicas are taken for equals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from services.common.messages import PrefillPlace
from services.replica.handover import PrefillLoad

# Until something is measured.
ASSUMED_PREFILL_TOKENS_PER_S = 2000.0
ASSUMED_TRANSFER_BYTES_PER_S = 1e9
ASSUMED_HANDOVER_MS = 15.0

# What a reply that is held up counts beside a turn that waits for its first token: people read more slowly than tokens
# come. Where no sequence runs yet, one is expected to start meanwhile.
HELD_UP_WEIGHT = 0.25


@dataclass(frozen=True, slots=True)
class Situation:
    """What the decision rests on.

    num_tokens: whose KV is needed; num_local_tokens: held here already; num_remote_tokens: leading tokens that another
    replica holds. Of this replica: num_running sequences, num_waiting_tokens still to be computed, its prefill rate.
    handover_ms: of one call to another replica, without computing and without transfer. Rates are None until measured.
    prefill: None if there is no prefill replica.
    """

    num_tokens: int
    num_local_tokens: int
    num_remote_tokens: int
    bytes_per_token: int
    num_running: int
    num_waiting_tokens: int
    prefill_tokens_per_s: float | None
    transfer_bytes_per_s: float | None
    handover_ms: float | None
    prefill: PrefillLoad | None


@dataclass(frozen=True, slots=True)
class Plan:
    """place: where the missing tokens are computed; reason: why, as a sentence; fetches_history: whether that which
    another replica holds is fetched first."""

    place: PrefillPlace
    reason: str
    fetches_history: bool


def plan(situation: Situation, mode: Literal["auto", "always", "never"]) -> Plan:
    """The cheapest way. mode: of settings.decode.remote_prefill; `always` and `never` leave no choice of the place."""
    local, remote = situation.num_local_tokens, situation.num_remote_tokens
    fetches = False
    if remote > local:
        without = min(_here_ms(situation, local), _prefill_ms(situation, local, mode))
        with_it = min(_here_ms(situation, remote), _prefill_ms(situation, remote, mode))
        fetches = _handover_ms(situation) + _transfer_ms(situation, remote - local) + with_it < without
    return replan(situation, remote if fetches else local, mode, fetches_history=fetches)


def replan(
    situation: Situation, num_held: int, mode: Literal["auto", "always", "never"], *, fetches_history: bool = False
) -> Plan:
    """Where to compute what is missing once num_held tokens are in place."""
    missing = situation.num_tokens - num_held
    if missing <= 0:
        return Plan(PrefillPlace.DECODE, "everything is held here", fetches_history)
    if situation.prefill is None:
        return Plan(PrefillPlace.DECODE, "there is no prefill replica", fetches_history)
    if mode == "never":
        return Plan(PrefillPlace.DECODE, "remote prefill is turned off", fetches_history)
    if mode == "always":
        return Plan(PrefillPlace.PREFILL, "remote prefill is always asked", fetches_history)
    here_ms, prefill_ms = _here_ms(situation, num_held), _prefill_ms(situation, num_held, mode)
    measured = "" if _is_measured(situation) else " (assumed: nothing is measured yet)"
    times = f"{missing} tokens: {here_ms:.0f} ms here, {prefill_ms:.0f} ms by prefill{measured}"
    if prefill_ms < here_ms:
        return Plan(PrefillPlace.PREFILL, f"a prefill replica is faster for {times}", fetches_history)
    return Plan(PrefillPlace.DECODE, f"this replica is faster for {times}", fetches_history)


def _here_ms(situation: Situation, num_held: int) -> float:
    """Time to compute the rest here, and what that costs the sequences that run here."""
    rate = situation.prefill_tokens_per_s or _prefill_rate(situation) or ASSUMED_PREFILL_TOKENS_PER_S
    wait_ms = situation.num_waiting_tokens / rate * 1e3
    compute_ms = (situation.num_tokens - num_held) / rate * 1e3
    return wait_ms + compute_ms * (1 + HELD_UP_WEIGHT * max(situation.num_running, 1))


def _prefill_ms(situation: Situation, num_held: int, mode: str) -> float:
    """Time until a prefill replica has computed the rest and handed it over."""
    load = situation.prefill
    if load is None or mode == "never":
        return float("inf")
    rate = load.prefill_tokens_per_s or situation.prefill_tokens_per_s or ASSUMED_PREFILL_TOKENS_PER_S
    missing = situation.num_tokens - num_held
    compute_ms = (load.num_waiting_tokens + missing) / rate * 1e3
    # It may hold some of the history, which only it knows: the dearer case is assumed.
    history_ms = _handover_ms(situation) + _transfer_ms(situation, num_held) if num_held else 0.0
    return _handover_ms(situation) + history_ms + compute_ms + _transfer_ms(situation, missing)


def _transfer_ms(situation: Situation, num_tokens: int) -> float:
    rate = situation.transfer_bytes_per_s or ASSUMED_TRANSFER_BYTES_PER_S
    return num_tokens * situation.bytes_per_token / rate * 1e3


def _handover_ms(situation: Situation) -> float:
    return ASSUMED_HANDOVER_MS if situation.handover_ms is None else situation.handover_ms


def _prefill_rate(situation: Situation) -> float | None:
    return situation.prefill.prefill_tokens_per_s if situation.prefill else None


def _is_measured(situation: Situation) -> bool:
    return situation.prefill_tokens_per_s is not None or _prefill_rate(situation) is not None
