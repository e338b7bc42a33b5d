"""No container engine runs in CI, so this reads the Dockerfile and compose.yaml and checks all that they name."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.common.settings import Settings
from services.ray_environment import prepare_environment
from tests.manifests.kustomize import K8S, ROOT, build
from tests.manifests.model import DEPLOYMENTS, Cluster, Pod

DEPLOY = ROOT / "deploy"
TOOLS = Path(sys.executable).parent
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
# Of prepare_environment: what only fits one machine, or is a secret.
NOT_IN_THE_IMAGE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "PYTHONPATH"}


def instructions() -> Iterator[tuple[str, str]]:
    """Keyword and the rest, with continued lines joined and comments dropped."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if line.strip():
            keyword, _, rest = line.strip().partition(" ")
            yield keyword, rest.strip()


def stages() -> dict[str, str]:
    """Stage -> what it is made from."""
    return {rest.split(" AS ")[1]: rest.split(" AS ")[0] for keyword, rest in instructions() if keyword == "FROM"}


def reaches_the_builder(path: str) -> bool:
    """By .dockerignore: everything is left out but what is named with a `!`, and that again by the rules after it."""
    is_in = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        rule = line.lstrip("!")
        if rule and not line.startswith("#") and (fnmatch(path, rule) or path.startswith(rule + "/")):
            is_in = line.startswith("!")
    return is_in


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([TOOLS / "hadolint", DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_targets_are_there_and_the_base_is_pinned() -> None:
    made = stages()
    assert {"cpu", "gpu"} <= set(made)
    outside = {base for base in made.values() if base not in made}
    assert all(re.fullmatch(r"python:\d+\.\d+\.\d+-slim-bookworm", base) for base in outside), outside


def test_every_copied_file_exists_and_reaches_the_builder() -> None:
    made = set(stages())
    for _, rest in (each for each in instructions() if each[0] == "COPY"):
        *sources, _ = [word for word in rest.split() if not word.startswith("--")]
        origin = re.search(r"--from=(\S+)", rest)
        if origin is not None:
            assert origin[1] in made
        else:
            assert [each for each in sources if not (ROOT / each).exists() or not reaches_the_builder(each)] == []


def test_secrets_and_history_do_not_reach_the_builder() -> None:
    assert not any(
        map(reaches_the_builder, ("deploy/secrets/antiphon-ray/auth_token", ".git/config", ".venv/bin/python"))
    )
    assert reaches_the_builder("services/app.py")


def test_the_image_runs_as_nobody_and_says_how_it_is() -> None:
    done = list(instructions())
    assert [rest for keyword, rest in done if keyword == "USER"][-1] == "1000:1000"
    checks = [rest for keyword, rest in done if keyword == "HEALTHCHECK"]
    (command,) = (json.loads(rest[rest.index("[") :]) for rest in checks)
    assert command[:2] == ["python", "-c"]
    ast.parse(command[2])


def test_every_command_of_the_image_exists() -> None:
    commands = [json.loads(rest) for keyword, rest in instructions() if keyword in ("CMD", "ENTRYPOINT")]
    assert commands
    assert all((TOOLS / command[0]).exists() for command in commands)


def test_the_image_sets_what_a_cluster_needs() -> None:
    wanted: dict[str, str] = {}
    prepare_environment(wanted)
    text = " ".join(rest for keyword, rest in instructions() if keyword == "ENV")
    given = dict(re.findall(r"(\w+)=(\S+)", text))
    assert {key: given.get(key) for key in wanted if key not in NOT_IN_THE_IMAGE} == {
        key: value for key, value in wanted.items() if key not in NOT_IN_THE_IMAGE
    }


# compose.yaml


def settings_of_compose() -> Settings:
    document = yaml.safe_load((DEPLOY / "serve" / "cluster.yaml").read_text())
    return Settings.from_mapping(document["applications"][0]["args"], SERVICES["head"]["environment"])


@lru_cache
def help_of(*command: str) -> str:
    return subprocess.run(
        [TOOLS / command[0], *command[1:], "--help"], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("name", [name for name in SERVICES if "antiphon" in SERVICES[name]["image"]])
def test_every_command_and_option_exists(name: str) -> None:
    program, verb, *words = SERVICES[name]["command"]
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    assert options
    assert [option for option in options if option not in help_of(program, verb)] == []


def test_everything_that_is_mounted_or_waited_for_exists() -> None:
    for service in SERVICES.values():
        assert all((DEPLOY / mount["source"]).exists() for mount in service.get("volumes", []))
        assert set(service.get("depends_on", {})) <= set(SERVICES)
        assert {secret["source"] for secret in service.get("secrets", [])} <= set(COMPOSE["secrets"])
        assert set(service.get("networks", [])) <= set(COMPOSE["networks"])


def test_the_script_makes_every_secret(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "cluster_secrets.py"), "--directory", str(tmp_path / "secrets")]
    subprocess.run(script, check=True)
    files = [secret["file"] for secret in COMPOSE["secrets"].values()]
    assert [file for file in files if not (tmp_path / file).exists()] == []


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_each_deployment_has_a_container_with_its_files(name: str) -> None:
    settings, service = settings_of_compose(), SERVICES[name]
    offered = json.loads(next(word for word in service["command"] if "--resources=" in word).partition("=")[2])
    assert offered == getattr(settings, name).resources
    assert service.get("deploy", {}).get("replicas", 1) == getattr(settings, name).num_replicas
    wanted = {"gateway": {settings.gateway.auth_tokens_file}, "tokenizer": set()}.get(name, set())
    if name != "tokenizer":
        wanted |= {settings.sessions.password_file, settings.sessions.secret_file}
    assert {str(path) for path in wanted} <= {secret["target"] for secret in service["secrets"]}


def test_the_head_has_the_files_of_the_policy() -> None:
    sessions = settings_of_compose().sessions
    targets = {secret["target"] for secret in SERVICES["head"]["secrets"]}
    assert {str(sessions.password_file), str(sessions.secret_file)} <= targets


def test_the_scraper_asks_every_process_that_has_metrics() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    (found,) = config["scrape_configs"][0]["dns_sd_configs"]
    telemetry = settings_of_compose().telemetry
    assert set(found["names"]) == {"gateway", "prefill", "decode"}
    assert found["port"] == telemetry.metrics_port == telemetry.replica_metrics_port


def test_the_images_are_those_of_kubernetes() -> None:
    pods: list[Pod] = Cluster("base", build(K8S / "base")).pods
    ours = {service["image"] for service in SERVICES.values() if "profiles" not in service}
    assert ours == {pod.main["image"] for pod in pods}
    assert all(re.search(r":v?\d+\.\d+\.\d+", service["image"]) for service in SERVICES.values())


def test_clients_reach_the_gateway_and_only_from_this_machine() -> None:
    port = settings_of_compose().gateway.port
    assert {name: service["ports"] for name, service in SERVICES.items() if "ports" in service} == {
        "gateway": [f"127.0.0.1:{port}:{port}"],
        "prometheus": ["127.0.0.1:9090:9090"],  # only where it is asked for
    }
    assert SERVICES["prometheus"]["profiles"]
    assert COMPOSE["networks"]["inside"]["internal"]
