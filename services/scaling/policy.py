"""The decision for the whole application: needs, windows, ratio, and the sessions that a decode replica holds.

need        of each kind, from the load of the moment            need.py
steady      hysteresis and windows, so that it does not oscillate    steady.py
keeping     a decode replica goes only if its sessions' KV is not lost    keeping.py
ratio       prefill and decode stay in proportion                ratio.py
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from services.common.settings import AutoscalingSettings, ReplicaBounds
from services.scaling.keeping import Leaving, dearest_to_leave
from services.scaling.need import Need, need_of
from services.scaling.ratio import Pair, in_proportion
from services.scaling.snapshot import Kind, Snapshot
from services.scaling.steady import Steady

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas of a kind there should be, and why. needed: by the load of the moment, before the windows."""

    kind: Kind
    current: int
    target: int
    needed: float
    reason: str
    inputs: dict[str, object] = field(default_factory=dict)


class ScalingPolicy:
    """Decides at each snapshot, which must come in the order of their times. Keeps what it has seen within its windows.

    A policy that has just begun (its process may have been restarted) gives up no replica before a whole window.
    """

    def __init__(self, settings: AutoscalingSettings) -> None:
        self._settings = settings
        self._steady = {kind: self._windows(kind) for kind in Kind}
        self._last: dict[Kind, tuple[int, str]] = {}

    def decide(self, snapshot: Snapshot) -> Mapping[Kind, Decision]:
        """One decision for each kind that has a target; those that are new are logged with their inputs."""
        decisions = {kind: self._alone(kind, snapshot) for kind in Kind if kind in snapshot.targets}
        if Kind.DECODE in decisions:
            decisions[Kind.DECODE] = self._keep_sessions(decisions[Kind.DECODE], snapshot)
        if Kind.PREFILL in decisions and Kind.DECODE in decisions:
            decisions |= self._in_proportion(decisions[Kind.PREFILL], decisions[Kind.DECODE])
        for decision in decisions.values():
            self._steady[decision.kind].held(decision.target)
            self._log(decision, snapshot)
        return decisions

    def _windows(self, kind: Kind) -> Steady:
        settings = self._settings
        return Steady(
            up_window_s=settings.up_window_s,
            down_window_s=settings.down_window_s,
            down_margin=settings.down_margin,
            # One at a time: each hands its sessions over to the others.
            max_step_down=1 if kind is Kind.DECODE else None,
        )

    def _alone(self, kind: Kind, snapshot: Snapshot) -> Decision:
        need, current, bounds = need_of(kind, snapshot, self._settings), snapshot.targets[kind], self._bounds(kind)
        target = self._steady[kind].target(snapshot.now_s, need.replicas, current, bounds.min, bounds.max)
        return Decision(kind, current, target, need.replicas, _why(need, current, target), dict(need.signals))

    def _bounds(self, kind: Kind) -> ReplicaBounds:
        bounds: ReplicaBounds = getattr(self._settings, kind.value)
        return bounds

    def _keep_sessions(self, decision: Decision, snapshot: Snapshot) -> Decision:
        if decision.target >= decision.current:
            return decision
        cost = dearest_to_leave(snapshot.decode, self._settings)
        if cost is None:
            return decision
        inputs = decision.inputs | {"leaving": asdict(cost)}
        # Above its most it has to shrink, whatever that costs.
        if cost.is_allowed or decision.current > self._settings.decode.max:
            return Decision(decision.kind, decision.current, decision.target, decision.needed, decision.reason, inputs)
        reason = f"kept for its sessions: {_refusal(cost)}"
        return Decision(decision.kind, decision.current, decision.current, decision.needed, reason, inputs)

    def _in_proportion(self, prefill: Decision, decode: Decision) -> dict[Kind, Decision]:
        pair = in_proportion(Pair(prefill.target, decode.target), self._settings)
        return {
            Kind.PREFILL: _with_target(prefill, pair.prefill, f"beside {pair.decode} decode replicas"),
            Kind.DECODE: _with_target(decode, pair.decode, f"beside {pair.prefill} prefill replicas"),
        }

    def _log(self, decision: Decision, snapshot: Snapshot) -> None:
        """Changes, and what keeps one from being made, at INFO; the rest at DEBUG."""
        word = decision.reason.partition(":")[0]
        is_news = decision.target != decision.current or self._last.get(decision.kind) != (decision.target, word)
        self._last[decision.kind] = (decision.target, word)
        level = logging.INFO if is_news else logging.DEBUG
        if not log.isEnabledFor(level):
            return
        details = {
            "kind": decision.kind.value,
            "current": decision.current,
            "target": decision.target,
            "needed": round(decision.needed, 3),
            "inputs": decision.inputs,
            "replicas": [asdict(each) for each in getattr(snapshot, decision.kind.value)],
        }
        log.log(level, "scaling decision", extra={"reason": decision.reason, "details": details})


def _why(need: Need, current: int, target: int) -> str:
    if target == current:
        return "enough: the load needs no other number now"
    leading = max(need.signals, key=lambda name: need.signals[name], default="nothing")
    word = "more" if target > current else "fewer"
    return f"{word}: {leading} needs {need.replicas:.2f}"


def _refusal(cost: Leaving) -> str:
    if not cost.has_room:
        return f"no other replica has room for {cost.num_tokens} tokens of {cost.replica_id}"
    return f"to hand over takes {cost.handover_s:.2f} s, to compute again {cost.recompute_s:.2f} s"


def _with_target(decision: Decision, target: int, reason: str) -> Decision:
    if target == decision.target:
        return decision
    reason = f"ratio: {reason}"
    return Decision(decision.kind, decision.current, target, decision.needed, reason, decision.inputs)
