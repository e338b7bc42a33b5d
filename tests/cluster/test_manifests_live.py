"""The laptop overlay's application for real: its settings, session store and secrets; watched by a real Prometheus.

What differs from Kubernetes: one machine offers all the resources, so ports that several replicas would share are free
ones, and the files lie elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

# isort: split
from tests.cluster.serving import GREEDY, collect

# isort: split
from ray import serve

from services.app import APP_NAME, deployed
from services.client import AsyncClient
from services.common.errors import NotFound, Unauthenticated
from services.common.settings import Settings
from services.common.telemetry import METRICS
from services.drain import running_turns
from services.sessions.connect import connect
from services.sessions.from_settings import keyspace_of, redis_settings
from services.sessions.registry import ReplicaRegistry, Role
from tests.manifests.kustomize import K8S, ROOT, build
from tests.manifests.model import Cluster
from tests.manifests.stores import free_port, make_secrets, store, with_stores
from tests.redis_servers import binary_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(300)]

# After a conversation each of these has been written to; others wait for an event of their kind.
WRITTEN = {
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "kv_blocks", "num_preemptions"),
    *("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "request_success"),
    *("request_failures", "redis_up", "degraded_mode"),
}


@dataclass(frozen=True)
class Running:
    """The application, and where each of its processes has its metrics."""

    settings: Settings
    target: str
    token: str
    metrics: dict[str, set[str]]  # role -> host:port


def here(settings: Settings) -> Settings:
    """The overlay's settings where one machine has all replicas."""
    telemetry = {"metrics_host": "127.0.0.1", "metrics_port": free_port(), "replica_metrics_port": 0}
    changes = {
        # A policy that reacts to this machine's load would change what is scraped.
        "autoscaling": settings.autoscaling.model_copy(update={"enabled": False}),
        "telemetry": settings.telemetry.model_copy(update=telemetry),
        "gateway": settings.gateway.model_copy(
            update={"host": "127.0.0.1", "port": free_port(), "drain_timeout_s": 1.0}
        ),
        "prefill": settings.prefill.model_copy(update={"num_cpus": 0.1}),
        "decode": settings.decode.model_copy(update={"num_cpus": 0.1}),
    }
    return settings.model_copy(update=changes)


@pytest.fixture(scope="module")
def running(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    secrets: Path = tmp_path_factory.mktemp("secrets")
    data: Path = tmp_path_factory.mktemp("store")
    assert make_secrets("--directory", str(secrets)).returncode == 0
    overlay = Cluster("cpu-demo", build(K8S / "overlays" / "cpu-demo"))
    with store(binary_of("embedded"), "sessions-redis", secrets, data) as port:
        settings = here(with_stores(overlay, secrets, port))
        with deployed(settings) as gateway:
            token = yaml.safe_load((secrets / "antiphon-tenants" / "tokens.yaml").read_text())["demo"]
            addresses = {"gateway": {gateway.metrics_address.remote().result()}}
            for role in ("prefill", "decode"):
                addresses[role] = metrics_of(role, getattr(settings, role).num_replicas)
            yield Running(settings, gateway.address.remote().result(), token, addresses)


def metrics_of(role: str, num_replicas: int) -> set[str]:
    """Asks replicas at random until all have answered."""
    handle = serve.get_deployment_handle(role, APP_NAME)
    found: set[str] = set()
    for _ in range(200):
        found.add(handle.metrics_address.remote().result())
        if len(found) == num_replicas:
            return found
    raise AssertionError(f"{len(found)} of {num_replicas} replicas answer")


async def talk(running: Running) -> None:
    """Two turns of a session, and a call that fails."""
    async with AsyncClient(running.target, token=running.token) as client:
        session = await client.create_session()
        await collect(session.chat("Tell me a story.", sampling=GREEDY))
        await collect(session.chat("And then?", sampling=GREEDY))
        with pytest.raises(NotFound):
            await client.get_session("nobody")


async def test_the_application_of_the_manifests_answers_and_wants_a_token(running: Running) -> None:
    assert running.target.rpartition(":")[2] == str(running.settings.gateway.port)
    await talk(running)
    async with AsyncClient(running.target) as stranger:
        with pytest.raises(Unauthenticated):
            await stranger.list_sessions()


async def test_decode_replicas_register_the_address_that_ray_knows(running: Running) -> None:
    client = connect(redis_settings(running.settings.sessions))
    records = await ReplicaRegistry(client, keyspace_of(running.settings.sessions)).list(Role.DECODE)
    await client.aclose()
    assert len(records) == running.settings.decode.num_replicas
    assert {record.address.rpartition(":")[0] for record in records} == {"127.0.0.1"}


async def test_an_idle_gateway_may_end(running: Running) -> None:
    (address,) = running.metrics["gateway"]
    assert address.endswith(f":{running.settings.telemetry.metrics_port}")
    await talk(running)
    async with asyncio.timeout(30):
        while running_turns(f"http://{address}/metrics"):
            await asyncio.sleep(0.1)


# A real Prometheus


class Prometheus:
    """Its HTTP API."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def get(self, path: str, **query: str) -> Any:
        """The data of an answer; an expression that it refuses raises."""
        with urllib.request.urlopen(f"{self._url}/{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            document = json.load(answer)
        assert document["status"] == "success"
        return document["data"]

    def query(self, expr: str) -> list[Any]:
        """The series that an expression has now."""
        return list(self.get("query", query=expr)["result"])


@contextmanager
def prometheus(folder: Path, metrics: dict[str, set[str]]) -> Iterator[Prometheus]:
    """Scrapes every process each second, with the rules of deploy/prometheus."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not on PATH (Debian and Ubuntu: apt-get install prometheus)")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ROOT / "deploy" / "prometheus" / "rules.yaml")],
        "scrape_configs": [
            {"job_name": role, "static_configs": [{"targets": sorted(targets)}]} for role, targets in metrics.items()
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    options = {
        "config.file": folder / "prometheus.yaml",
        "storage.tsdb.path": folder / "data",
        "web.listen-address": f"127.0.0.1:{port}",
        "log.level": "error",
    }
    process = subprocess.Popen([binary, *(f"--{key}={value}" for key, value in options.items())])
    try:
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(20)


async def until(condition: Any, timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                if condition():
                    return
            except OSError:
                pass  # it does not listen yet
            await asyncio.sleep(0.5)


def panel_expressions() -> Iterator[str]:
    """Of all dashboards, with Grafana's variables filled in as Grafana does."""
    for path in sorted((ROOT / "deploy" / "grafana").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                yield target["expr"].replace("$model", ".*").replace("$__rate_interval", "1m")


def stems_in(expr: str, written: set[str]) -> tuple[set[str], bool]:
    """The metrics that an expression asks for, and whether all have been written to."""
    names = set(re.findall(r"\bantiphon_([a-z0-9_]+)", expr))
    stems = {spec.stem for spec in METRICS if names & {spec.stem + end for end in ("", "_total", "_bucket", "_count")}}
    return stems, stems <= written


async def test_every_expression_runs_in_a_prometheus_that_scrapes_the_cluster(running: Running, tmp_path: Path) -> None:
    num_processes = sum(len(addresses) for addresses in running.metrics.values())
    with prometheus(tmp_path, running.metrics) as server:
        await until(lambda: len(server.query("up == 1")) == num_processes)
        for _ in range(3):
            await talk(running)
            await asyncio.sleep(1.5)  # rates need samples before and after
        counted = "sum(rate(antiphon_request_success_total[1m])) > 0 and sum(antiphon:ttft:bad_ratio_rate5m) >= 0"
        await until(lambda: server.query(counted))
        names = {name.removeprefix("antiphon_") for name in server.get("label/__name__/values")}
        ends = ("", "_total", "_bucket")
        written = {spec.stem for spec in METRICS if names & {spec.stem + end for end in ends}}
        assert written >= WRITTEN
        for expr in panel_expressions():
            _, is_written = stems_in(expr, written)
            assert server.query(expr) or not is_written, expr
        rules = [rule for group in server.get("rules")["groups"] for rule in group["rules"]]
        assert {rule["health"] for rule in rules} == {"ok"}, rules
        assert {"AntiphonSessionStoreDown", "AntiphonVerificationFailure", "AntiphonNoGateway"}.isdisjoint(
            alert["labels"]["alertname"] for alert in server.get("alerts")["alerts"]
        )
