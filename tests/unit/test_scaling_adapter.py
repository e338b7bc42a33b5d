"""Between Serve, the registry and the decision: what is read, what is asked for, and what if nothing can be read."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# isort: split
import tests.cluster.ray_session  # noqa: F401  (sets variables that Ray reads when it is imported)

# isort: split
import yaml
from ray.serve.config import AutoscalingPolicy
from ray.serve.schema import ServeDeploySchema

from services.app import build_app
from services.common.errors import InvalidSettings
from services.common.settings import Settings
from services.scaling.deployment import ApplicationPolicy
from services.scaling.picture import Picture
from services.scaling.serve_options import POLICY, replica_options, serve_config
from services.scaling.snapshot import Kind
from services.sessions.connect import connect
from services.sessions.embedded import EmbeddedServer
from services.sessions.from_settings import keyspace_of, redis_settings
from services.sessions.registry import ReplicaRecord, ReplicaRegistry, Role

CONFIG = Path(__file__).parents[2] / "deploy" / "serve" / "autoscaling.yaml"
ONE_TO_THREE = {"min": 1, "max": 3}
SCALING = {
    "enabled": True,
    "interval_s": 0.05,
    "down_window_s": 60.0,
    **dict.fromkeys(("gateway", "tokenizer", "prefill", "decode"), ONE_TO_THREE),
}


def record(role: Role, name: str, **changes: object) -> ReplicaRecord:
    known = ReplicaRecord(role, name, f"{name}-1", 0.0, "m", "l", 16, 100, 100, prefill_tokens_per_s=1000.0)
    return replace(known, **changes)  # type: ignore[arg-type]


# The picture.


def demand_after(looks: list[tuple[float, list[ReplicaRecord]]]) -> float:
    picture = Picture()
    for now_s, records in looks:
        snapshot = picture.snapshot(now_s, {}, records, {})
    return snapshot.prefill_demand_tokens_per_s


def test_prefill_demand_is_what_all_replicas_computed_of_late() -> None:
    def look(a: int, b: int) -> list[ReplicaRecord]:
        return [
            record(Role.PREFILL, "a", num_prefilled_tokens=a),
            record(Role.PREFILL, "b", num_prefilled_tokens=b),
            record(Role.DECODE, "d", num_prefilled_tokens=10**6),
        ]

    assert demand_after([(0.0, look(5000, 0))]) == 0.0
    assert demand_after([(0.0, look(5000, 0)), (2.0, look(6000, 500))]) == 750.0
    # Only the last ten seconds count.
    assert demand_after([(0.0, look(0, 0)), (1.0, look(9000, 0)), (8.0, look(9000, 0)), (11.5, look(9000, 0))]) == 0.0


def test_a_replica_that_is_new_counts_from_its_start_and_one_that_left_does_not() -> None:
    old, new = record(Role.PREFILL, "a", num_prefilled_tokens=800), record(Role.PREFILL, "b", num_prefilled_tokens=300)
    assert demand_after([(0.0, [old]), (1.0, [old, new])]) == 300.0
    assert demand_after([(0.0, [old, new]), (1.0, [new])]) == 0.0


def refused_after(looks: list[tuple[float, list[ReplicaRecord]]]) -> int:
    picture = Picture()
    for now_s, records in looks:
        snapshot = picture.snapshot(now_s, {}, records, {})
    return snapshot.num_refused_blocks


def test_a_turn_that_all_replicas_refused_counts_once_and_for_a_few_seconds() -> None:
    def look(a: int, b: int) -> list[ReplicaRecord]:
        return [record(Role.DECODE, name, num_refused_blocks=n) for name, n in (("a", a), ("b", b))]

    before = (0.0, look(70, 90))
    assert refused_after([before]) == 0
    assert refused_after([before, (1.0, look(170, 190))]) == 100
    assert refused_after([before, (1.0, look(170, 190)), (2.0, look(170, 230))]) == 140
    assert refused_after([before, (1.0, look(170, 190)), (7.0, look(170, 190))]) == 0


# The policy that Serve calls.


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[tuple[dict[str, Any], EmbeddedServer]]:
    """Of a real store, with scaling on."""
    with EmbeddedServer(tmp_path / "store") as server:
        password = server.url.partition(":")[2].lstrip("/").partition("@")[0].lstrip(":")
        (tmp_path / "password").write_text(password)
        (tmp_path / "secret").write_text("s" * 32)
        port = server.url.rpartition(":")[2].partition("/")[0]
        sessions = {
            "store": "redis",
            "url": f"redis://127.0.0.1:{port}/0",
            "password_file": str(tmp_path / "password"),
            "secret_file": str(tmp_path / "secret"),
        }
        yield {"sessions": sessions, "gateway": {"port": 0}, "autoscaling": SCALING}, server


def register(settings: Mapping[str, Any], *records: ReplicaRecord) -> None:
    async def beat() -> None:
        sessions = Settings.from_mapping(settings, {}).sessions
        client = connect(redis_settings(sessions))
        for each in records:
            await ReplicaRegistry(client, keyspace_of(sessions)).heartbeat(each, 60.0)
        await client.aclose()

    asyncio.run(beat())


def contexts(**targets: int) -> dict[Any, Any]:
    """As Serve gives them. Gateways say that they keep 1.5 cores busy."""
    points = {
        "num_cpus": [SimpleNamespace(value=9.0), SimpleNamespace(value=1.5)],
        "num_calls": [SimpleNamespace(value=2)],
    }
    raw = {name: {"replica": series} for name, series in points.items()}
    return {
        DeploymentKey(name): SimpleNamespace(target_num_replicas=target, raw_metrics=raw if name == "gateway" else {})
        for name, target in targets.items()
    }


class DeploymentKey(str):
    """Stands for Serve's DeploymentID: has a name and can be a key."""

    @property
    def name(self) -> str:
        return str(self)


def first_decision(policy: ApplicationPolicy, asked: dict[Any, Any], timeout_s: float = 10.0) -> dict[str, int]:
    ends_s = time.monotonic() + timeout_s
    while time.monotonic() < ends_s:
        decisions, state = policy(asked)
        assert state == {}
        if decisions:
            return {key.name: number for key, number in decisions.items()}
        time.sleep(0.02)
    return {}


@pytest.fixture
def policy_of() -> Iterator[Callable[[Mapping[str, Any]], ApplicationPolicy]]:
    made: list[ApplicationPolicy] = []

    def make(settings: Mapping[str, Any]) -> ApplicationPolicy:
        # As Serve does it: from the import path, sent to the controller by value.
        policy = AutoscalingPolicy(policy_function=POLICY, policy_kwargs={"settings": settings})
        made.append(policy.get_policy()(**policy.policy_kwargs))
        return made[-1]

    yield make
    for policy in made:
        policy.close()


def test_decides_by_registry_and_by_what_gateways_say(
    settings: tuple[dict[str, Any], EmbeddedServer], policy_of: Callable[..., ApplicationPolicy]
) -> None:
    values, _ = settings
    register(values, record(Role.PREFILL, "p", num_waiting_tokens=1800), record(Role.DECODE, "d", num_free_blocks=10))
    asked = contexts(gateway=1, tokenizer=1, prefill=1, decode=1)
    assert first_decision(policy_of(values), asked) == {"gateway": 3, "tokenizer": 1, "prefill": 2, "decode": 2}


def test_without_the_store_nothing_changes(
    settings: tuple[dict[str, Any], EmbeddedServer], policy_of: Callable[..., ApplicationPolicy]
) -> None:
    values, server = settings
    register(values, record(Role.PREFILL, "p"), record(Role.DECODE, "d"))
    short = values | {"sessions": values["sessions"] | {"registry_ttl_s": 0.5, "heartbeat_s": 0.2}}
    policy, asked = policy_of(short), contexts(prefill=2, decode=2)
    assert first_decision(policy, asked) == {"prefill": 2, "decode": 2}
    server.stop()
    time.sleep(0.6)
    assert first_decision(policy, asked, timeout_s=0.5) == {}


def test_settings_of_a_store_that_cannot_be_named_are_refused_at_once() -> None:
    with pytest.raises(InvalidSettings):
        ApplicationPolicy({"autoscaling": SCALING}, ignores_environment=True)


# What Serve is told.


def test_the_example_is_a_serve_config_whose_policy_reads_the_applications_settings() -> None:
    document = yaml.safe_load(CONFIG.read_text())
    application = ServeDeploySchema.model_validate(document).applications[0]
    assert application.autoscaling_policy is not None
    assert application.autoscaling_policy["policy_kwargs"]["settings"] == application.args
    assert Settings.from_yaml(CONFIG, {}).autoscaling.decode.max == 8


@pytest.mark.parametrize("mistake", ["no policy", "other settings", "policy alone"])
def test_a_config_whose_policy_and_settings_disagree_is_refused(mistake: str, tmp_path: Path) -> None:
    document = copy.deepcopy(yaml.safe_load(CONFIG.read_text()))
    application = document["applications"][0]
    if mistake == "no policy":
        del application["autoscaling_policy"]
    elif mistake == "other settings":
        application["autoscaling_policy"]["policy_kwargs"] = {"settings": {"model": {"path": "other"}}}
    else:
        del application["args"]["autoscaling"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(InvalidSettings, match="autoscaling_policy"):
        Settings.from_yaml(path, {})


def test_deployments_get_bounds_and_no_delay_of_serves_own() -> None:
    scaled = Settings.from_mapping({"decode": {"num_replicas": 2}, "autoscaling": SCALING}, {})
    assert replica_options(Kind.DECODE, scaled) == {
        "autoscaling_config": {
            "min_replicas": 1,
            "initial_replicas": 2,
            "max_replicas": 3,
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 0.0,
        }
    }
    assert replica_options(Kind.DECODE, Settings.from_mapping({"decode": {"num_replicas": 2}}, {})) == {
        "num_replicas": 2
    }


def test_the_config_that_is_deployed_carries_settings_unchanged(
    settings: tuple[dict[str, Any], EmbeddedServer],
) -> None:
    values = Settings.from_mapping(settings[0], {})
    config = ServeDeploySchema.model_validate(serve_config(values, "antiphon", "services.app:resolved_application"))
    assert Settings.from_mapping(config.applications[0].args, {}) == values
    gateway = build_app(values)._bound_deployment
    assert gateway._deployment_config.autoscaling_config.max_replicas == 3
