"""The Prometheus rules, from two tables: objectives, whose error budgets may burn, and single conditions.

Each objective has a ratio of bad events, recorded over four windows. It pages when an hour and the last five minutes
both burn a month's budget 14.4 times too fast, and asks for a look when six hours and half an hour do so 6 times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from services.common.telemetry import METRICS
from services.transfer.base import Cause

PREFIX = "antiphon_"
WINDOWS = ("5m", "30m", "1h", "6h")
BURNS = (("page", 14.4, "1h", "5m", "2m"), ("ticket", 6.0, "6h", "30m", "15m"))

# What a client can cause alone; every other reason of services/common/errors.py is ours.
CLIENT_REASONS = (
    *("INVALID_REQUEST", "PROMPT_TOO_LONG", "QUOTA_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "SESSION_BUSY"),
    "UNAUTHENTICATED",
)
# Blocks that arrived and were not what was published, or did not belong where they were going.
VERIFICATION = (Cause.LAYOUT, Cause.POSITION, Cause.TRUNCATED, Cause.DIGEST, Cause.MISPLACED)


@dataclass(frozen=True, slots=True)
class Objective:
    """Part of the events that must be good over a month. bad: the ratio of the others over WINDOW, by model_name."""

    name: str
    alert: str
    target: float
    bad: str
    summary: str


@dataclass(frozen=True, slots=True)
class Condition:
    """An alert by itself. wait: how long it has to hold."""

    alert: str
    expr: str
    wait: str
    severity: str
    summary: str
    do: str


def _slower_than(stem: str, limit_s: float) -> str:
    """Ratio of a histogram's observations above one of its bounds."""
    spec = next(each for each in METRICS if each.stem == stem)
    assert limit_s in spec.buckets, f"{stem} has no bound {limit_s}"
    good = f'sum by (model_name) (rate({PREFIX}{stem}_bucket{{role="gateway", le="{limit_s}"}}[WINDOW]))'
    return f'1 - {good} / sum by (model_name) (rate({PREFIX}{stem}_count{{role="gateway"}}[WINDOW]))'


_OURS = f'sum by (model_name) (rate({PREFIX}request_failures_total{{reason!~"{"|".join(CLIENT_REASONS)}"}}[WINDOW]))'
_WELL = f"sum by (model_name) (rate({PREFIX}request_success_total[WINDOW]))"
# Where nothing has failed yet, or nothing has gone well, there is no such series.
_FAILED, _ENDED = f"({_OURS} or 0 * {_WELL})", f"({_WELL} or 0 * {_OURS})"

OBJECTIVES = (
    Objective(
        *("ttft", "AntiphonSlowFirstToken", 0.99),
        _slower_than("time_to_first_token_seconds", 1.0),
        "Too many turns wait longer than a second for their first token",
    ),
    Objective(
        *("inter_token", "AntiphonSlowTokens", 0.99),
        _slower_than("inter_token_latency_seconds", 0.1),
        "Too many tokens come more than 100 ms after the one before",
    ),
    Objective(
        *("errors", "AntiphonErrors", 0.999),
        f"{_FAILED} / ({_FAILED} + {_ENDED})",
        "Too many calls fail for reasons of ours",
    ),
)

_VERIFICATION = f'{PREFIX}kv_transfer_failures_total{{reason=~"{"|".join(VERIFICATION)}"}}'
_BEFORE = f"{_VERIFICATION} offset 10m"
_FAILURES = f"sum by (model_name) (rate({PREFIX}kv_transfer_failures_total[10m]))"

CONDITIONS = (
    Condition(
        "AntiphonVerificationFailure",
        # A counter that appears with its first failure has no increase yet.
        f"{_VERIFICATION} - {_BEFORE} > 0 or ({_VERIFICATION} unless {_BEFORE}) > 0",
        *("0s", "page", "KV blocks arrived that were not what had been published"),
        "No token came of them: the replica computed anew. Look for a failing GPU or network card on `instance`.",
    ),
    Condition(
        "AntiphonSessionStoreDown",
        f"min by (role) ({PREFIX}redis_up) == 0",
        *("1m", "page", "The store of sessions does not answer"),
        "Turns of sessions fail meanwhile, others go on. See the pod and volume of sessions-redis.",
    ),
    Condition(
        "AntiphonNoGateway",
        f'absent({PREFIX}num_requests_running{{role="gateway"}})',
        *("5m", "page", "No gateway reports"),
        "See the gateway pods, then the application's status on Ray's dashboard.",
    ),
    Condition(
        "AntiphonKVPoolFull",
        f'{PREFIX}kv_cache_usage_perc{{role="decode"}} > 0.95',
        *("10m", "ticket", "A decode replica's KV blocks are all in use"),
        "Turns wait or are refused. Let decode grow (maxReplicas, autoscaling.decode.max) or give it more memory.",
    ),
    Condition(
        "AntiphonTransferFailures",
        f"{_FAILURES} / ({_FAILURES} + sum by (model_name) (rate({PREFIX}kv_transfer_seconds_count[10m]))) > 0.05",
        *("10m", "ticket", "More than one in twenty fetches of KV blocks fails"),
        "What was to be fetched is computed anew, so first tokens come later. See `reason` of kv_transfer_failures.",
    ),
    Condition(
        "AntiphonPreemptions",
        f"sum by (model_name) (rate({PREFIX}num_preemptions_total[10m])) > 0.1",
        *("10m", "ticket", "Sequences are put back to free their blocks"),
        "Their KV is computed twice. Let decode grow, or lower engine.max_num_sequences.",
    ),
    Condition(
        "AntiphonQueueGrows",
        f"sum by (model_name, role) ({PREFIX}num_requests_waiting) > 64",
        *("5m", "ticket", "Sequences wait for an engine"),
        "Too few replicas for the load, or the machines for more of them are missing: kubectl get pods.",
    ),
)


def rule_groups() -> dict[str, Any]:
    """The document of rules.yaml."""
    groups = [
        {"name": f"antiphon-{each.name}", "rules": [*_recordings(each), *_burn_alerts(each)]} for each in OBJECTIVES
    ]
    return {"groups": [*groups, {"name": "antiphon-conditions", "rules": [_alert(each) for each in CONDITIONS]}]}


def _recordings(objective: Objective) -> list[dict[str, Any]]:
    return [
        {"record": record_name(objective, window), "expr": objective.bad.replace("WINDOW", window)}
        for window in WINDOWS
    ]


def record_name(objective: Objective, window: str) -> str:
    """The recorded ratio of bad events."""
    return f"antiphon:{objective.name}:bad_ratio_rate{window}"


def _burn_alerts(objective: Objective) -> list[dict[str, Any]]:
    alerts = []
    for severity, burn, long, short, wait in BURNS:
        limit = f"{burn * (1 - objective.target):.6g}"
        expr = " and ".join(f"{record_name(objective, window)} > {limit}" for window in (long, short))
        burnt = f"a month's budget burns {burn:g} times too fast (objective {objective.target:.1%})"
        text = {"summary": objective.summary, "description": f"{{{{ $value | humanizePercentage }}}} are bad: {burnt}."}
        alerts.append(
            {"alert": objective.alert, "expr": expr, "for": wait, "labels": {"severity": severity}, "annotations": text}
        )
    return alerts


def _alert(condition: Condition) -> dict[str, Any]:
    text = {"summary": condition.summary, "description": condition.do}
    rule = {"alert": condition.alert, "expr": condition.expr, "for": condition.wait}
    return rule | {"labels": {"severity": condition.severity}, "annotations": text}
