"""How many replicas the load of a moment needs, as a fraction: pure functions, monotone in the load.

prefill     waiting prompt tokens over what one replica computes within the target queue time: a burst counts the
            moment it arrives, not when its requests have ended; and what is computed steadily, over its speed
decode      KV blocks in use, and those of turns that were refused for want of them, over what one replica may use;
            sequences, running and waiting, over what one can run within the inter-token target at its measured speed
helpers     cores and calls over what one replica may have
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from services.common.settings import AutoscalingSettings
from services.scaling.snapshot import HelperLoad, Kind, Snapshot, WorkerLoad


@dataclass(frozen=True, slots=True)
class Need:
    """Replicas needed (0 and more), and the signals it is the largest of."""

    replicas: float
    signals: dict[str, float]


def need_of(kind: Kind, snapshot: Snapshot, settings: AutoscalingSettings) -> Need:
    """What the load needs. Signals that nobody has measured yet do not count."""
    if kind is Kind.PREFILL:
        signals = _prefill(snapshot, settings)
    elif kind is Kind.DECODE:
        # What runs at a replica that drains ends there.
        staying = [each for each in snapshot.decode if not each.is_draining]
        signals = _decode(staying, snapshot.num_refused_blocks, settings)
    else:
        signals = _helper(snapshot.gateway if kind is Kind.GATEWAY else snapshot.tokenizer, settings)
    return Need(max(signals.values(), default=0.0), signals)


def median_rate(rates: Sequence[float | None]) -> float | None:
    """Of those that have been measured; None if none has."""
    measured = [rate for rate in rates if rate]
    return statistics.median(measured) if measured else None


def _prefill(snapshot: Snapshot, settings: AutoscalingSettings) -> dict[str, float]:
    rate = median_rate([each.prefill_tokens_per_s for each in snapshot.prefill]) or median_rate(
        [each.prefill_tokens_per_s for each in snapshot.decode]
    )
    if rate is None:
        return {}
    # A prompt that waits at a decode replica waits for want of prefill, too.
    waiting = sum(each.num_waiting_tokens for each in (*snapshot.prefill, *snapshot.decode))
    return {
        "queue": waiting / (rate * settings.target_queue_s),
        "busy": snapshot.prefill_demand_tokens_per_s / (rate * settings.max_prefill_busy),
    }


def _decode(replicas: Sequence[WorkerLoad], num_refused_blocks: int, settings: AutoscalingSettings) -> dict[str, float]:
    if not replicas:
        return {}
    blocks_of_one = statistics.mean(each.num_blocks for each in replicas)
    # What is used can never exceed what there is; by how much a burst does, only those say that were turned away.
    num_wanted_blocks = sum(each.num_used_blocks for each in replicas) + num_refused_blocks
    signals = {"kv": num_wanted_blocks / (blocks_of_one * settings.max_kv_usage)}
    # The largest: the others may have had fewer sequences in a step, not less speed.
    rate = max((each.decode_tokens_per_s or 0.0 for each in replicas), default=0.0)
    if rate:
        # n sequences at a rate of r tokens a second together see a token every n / r seconds.
        num_sequences = sum(each.num_sequences for each in replicas)
        # A replica more than there are sequences would make none of them faster.
        signals["inter_token"] = min(num_sequences / (rate * settings.target_inter_token_s), num_sequences)
    return signals


def _helper(replicas: Sequence[HelperLoad], settings: AutoscalingSettings) -> dict[str, float]:
    return {
        "cpu": sum(each.num_cpus for each in replicas) / settings.max_cpu,
        "calls": sum(each.num_calls for each in replicas) / settings.max_turns,
    }
