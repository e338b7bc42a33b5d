"""Generates what watches a cluster from the table of metrics (services/common/telemetry.py), or checks it is in sync.

    python scripts/dashboards.py            write deploy/grafana, deploy/prometheus and their Kubernetes objects
    python scripts/dashboards.py --check    change nothing; exit 1 if something differs

Every metric gets a panel by its kind; a new one that no row of ROWS names comes last. So no panel asks for a metric
that is not there, and none is forgotten.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from alert_rules import BURNS, OBJECTIVES, PREFIX, WINDOWS, record_name, rule_groups
from prometheus_client import Counter, Histogram

from services.common.telemetry import METRICS, MetricSpec

ROOT = Path(__file__).resolve().parents[1]
GRAFANA = ROOT / "deploy" / "grafana"
HEADER = "# Made by scripts/dashboards.py (make dashboards); change it there.\n"

SOURCE = {"type": "prometheus", "uid": "${source}"}
MODEL = 'model_name=~"$model"'
INTERVAL = "$__rate_interval"

# Which panels stand together; what is not named comes under "More".
ROWS: dict[str, tuple[str, ...]] = {
    "Turns": (
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
        *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
        *("request_success", "request_failures", "prompt_tokens", "generation_tokens"),
    ),
    "Engines": ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "kv_blocks", "num_preemptions"),
    "Cache and sessions": (
        *("prefix_cache_queries", "prefix_cache_hits", "affinity_hits", "affinity_misses", "migrations"),
        *("fence_rejections", "sessions_active", "redis_up", "degraded_mode"),
    ),
    "Hand-over of KV blocks": ("kv_transfer_seconds", "kv_transfer_bytes", "kv_transfer_failures"),
}
# Gauges of which the worst instance counts, not the sum.
WORST = {"kv_cache_usage_perc": "max", "redis_up": "min", "degraded_mode": "max"}


def _rate(stem: str, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({PREFIX}{stem}{{{MODEL}}}[{INTERVAL}]))"


# Title, unit, expression: what the overview shows besides the objectives.
RATIOS: tuple[tuple[str, str, str], ...] = (
    ("Reply tokens a second", "short", _rate("generation_tokens_total", "role")),
    (
        "Prompt tokens found in the cache",
        "percentunit",
        f"{_rate('prefix_cache_hits_total')} / {_rate('prefix_cache_queries_total')}",
    ),
    (
        "Later turns that went to a holder of their history",
        "percentunit",
        f"{_rate('affinity_hits_total')} / ({_rate('affinity_hits_total')} + {_rate('affinity_misses_total')})",
    ),
    ("KV bytes handed over a second", "Bps", _rate("kv_transfer_bytes_total", "role")),
    ("Turns in gateways", "short", f'sum by (instance) ({PREFIX}num_requests_running{{role="gateway", {MODEL}}})'),
    ("KV blocks in use", "percentunit", f'max by (instance) ({PREFIX}kv_cache_usage_perc{{role="decode", {MODEL}}})'),
)


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is out of sync")
    is_check = parser.parse_args().check
    stale = [path for path, text in files().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is out of sync: make dashboards' if is_check else 'written'}")
        if not is_check:
            path.write_text(files()[path])
    return 1 if is_check and stale else 0


def files() -> dict[Path, str]:
    """All that is generated."""
    rules = rule_groups()
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "antiphon", "namespace": "antiphon"},
        "spec": rules,
    }
    return {
        GRAFANA / "overview.json": _json(dashboard("antiphon", "antiphon: overview", overview())),
        GRAFANA / "metrics.json": _json(dashboard("antiphon-metrics", "antiphon: every metric", every_metric())),
        ROOT / "deploy" / "prometheus" / "rules.yaml": HEADER + _yaml(rules),
        ROOT / "k8s" / "components" / "monitoring" / "prometheusrule.yaml": HEADER + _yaml(resource),
    }


def overview() -> list[dict[str, Any]]:
    """Each objective's burn, then the ratios."""
    panels = [_row("Objectives: how fast the error budgets burn (1: exactly used up)")]
    for objective in OBJECTIVES:
        budget = 1 - objective.target
        targets = [
            (f"{record_name(objective, window)}{{{MODEL}}} / {budget:.6g}", f"{window} {{{{model_name}}}}")
            for window in WINDOWS
        ]
        limits = [burn for _, burn, *_ in BURNS]
        panels.append(_panel(objective.summary, "short", targets, limits=limits))
    return [*panels, _row("The cluster"), *(_panel(title, unit, [(expr, "")]) for title, unit, expr in RATIOS)]


def every_metric() -> list[dict[str, Any]]:
    """A panel for each metric, in rows."""
    specs = {spec.stem: spec for spec in METRICS}
    named = {stem for stems in ROWS.values() for stem in stems}
    unknown = named - set(specs)
    if unknown:
        raise SystemExit(f"ROWS names metrics that there are not: {sorted(unknown)}")
    rows = ROWS | {"More": tuple(stem for stem in specs if stem not in named)}
    panels = []
    for title, stems in rows.items():
        panels += [_row(title), *(_metric(specs[stem]) for stem in stems)] if stems else []
    return panels


def _metric(spec: MetricSpec) -> dict[str, Any]:
    by = ", ".join(("role", *spec.labels))
    legend = " ".join(f"{{{{{label}}}}}" for label in ("role", *spec.labels))
    if spec.kind is Histogram:
        buckets = f"sum by (le, {by}) (rate({PREFIX}{spec.stem}_bucket{{{MODEL}}}[{INTERVAL}]))"
        targets = [(f"histogram_quantile({q}, {buckets})", f"p{q * 100:g} {legend}") for q in (0.5, 0.9, 0.99)]
        return _panel(spec.help, "s", targets, spec.stem)
    if spec.kind is Counter:
        return _panel(f"{spec.help}, a second", "short", [(_rate(f"{spec.stem}_total", by), legend)], spec.stem)
    how = WORST.get(spec.stem, "sum")
    unit = "percentunit" if spec.stem.endswith("_perc") else "short"
    return _panel(spec.help, unit, [(f"{how} by ({by}) ({PREFIX}{spec.stem}{{{MODEL}}})", legend)], spec.stem)


def _panel(
    title: str, unit: str, targets: list[tuple[str, str]], stem: str = "", limits: list[float] | None = None
) -> dict[str, Any]:
    steps = [{"color": "green", "value": None}, *({"color": "red", "value": limit} for limit in sorted(limits or []))]
    defaults = {"unit": unit, "custom": {"thresholdsStyle": {"mode": "line" if limits else "off"}}}
    return {
        "type": "timeseries",
        "title": title,
        "description": f"{PREFIX}{stem}" if stem else "",
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {**defaults, "thresholds": {"mode": "absolute", "steps": steps}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend, "datasource": SOURCE}
            for i, (expr, legend) in enumerate(targets)
        ],
    }


def _row(title: str) -> dict[str, Any]:
    return {"type": "row", "title": title, "collapsed": False, "panels": []}


def dashboard(uid: str, title: str, panels: list[dict[str, Any]]) -> dict[str, Any]:
    """Panels three to a line under their rows, with a choice of source and model."""
    x = y = 0
    for number, panel in enumerate(panels, 1):
        is_row = panel["type"] == "row"
        if x and (is_row or x == 24):
            x, y = 0, y + 8
        panel |= {"id": number, "gridPos": {"h": 1 if is_row else 8, "w": 24 if is_row else 8, "x": x, "y": y}}
        x, y = (0, y + 1) if is_row else (x + 8, y)
    query = f"label_values({PREFIX}num_requests_running, model_name)"
    return {
        "uid": uid,
        "title": title,
        "tags": ["antiphon"],
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "type": "datasource", "query": "prometheus", "label": "Source"},
                {
                    "name": "model",
                    "type": "query",
                    "label": "Model",
                    "datasource": SOURCE,
                    "query": {"query": query, "refId": "model"},
                    "definition": query,
                    "refresh": 2,
                    "includeAll": True,
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": panels,
    }


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _yaml(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=1000, allow_unicode=True)


if __name__ == "__main__":
    sys.exit(main())
