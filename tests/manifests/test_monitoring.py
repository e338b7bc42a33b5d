"""Rules and dashboards: in sync with the table of metrics, accepted by promtool, each alert shown to fire."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.common.telemetry import METRICS
from tests.manifests.kustomize import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["groups"] for rule in group["rules"]
]
ALERTS = {rule["alert"] for rule in RULES if "alert" in rule}


def expressions(dashboard: Path) -> list[str]:
    panels = json.loads(dashboard.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def series_names() -> set[str]:
    """What a scrape of our processes can bring."""
    names = set()
    for spec in METRICS:
        suffixes = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_count", "_sum")}
        names |= {f"antiphon_{spec.stem}{suffix}" for suffix in suffixes[spec.kind.__name__]}
    return names | {rule["record"] for rule in RULES if "record" in rule}


def test_what_is_generated_is_in_sync() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "dashboards.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def promtool(*arguments: str) -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not on PATH (Debian and Ubuntu: apt-get install prometheus)")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False, cwd=PROMETHEUS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", "rules.yaml")


def test_promtool_accepts_the_configuration_of_compose() -> None:
    promtool("check", "config", "prometheus.yaml")


def test_alerts_fire_when_they_should() -> None:
    promtool("test", "rules", "rules_test.yaml")


def test_each_alert_is_shown_to_fire_and_to_be_quiet() -> None:
    cases = [
        case
        for test in yaml.safe_load((PROMETHEUS / "rules_test.yaml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == ALERTS
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == ALERTS


def test_every_metric_has_a_panel_and_no_panel_asks_for_another() -> None:
    asked = {
        name
        for dashboard in DASHBOARDS
        for expr in expressions(dashboard)
        for name in re.findall(r"\bantiphon[a-z0-9_:]+", expr)
    }
    assert asked <= series_names()
    shown = {spec.stem for spec in METRICS for name in asked if name.startswith(f"antiphon_{spec.stem}")}
    assert shown == {spec.stem for spec in METRICS}


def test_rules_ask_only_for_metrics_that_there_are() -> None:
    asked = {name for rule in RULES for name in re.findall(r"\bantiphon[a-z0-9_:]+", rule["expr"])}
    assert asked <= series_names()


def test_panels_do_not_overlap() -> None:
    for dashboard in DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(dashboard.read_text())["panels"]:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken
            taken |= cells
