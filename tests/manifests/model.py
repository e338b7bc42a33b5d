"""What `kubectl kustomize` builds, as a cluster would run it: pods with the labels and ports that KubeRay adds."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml

from services.common.errors import AntiphonError
from services.common.settings import Settings

Doc = dict[str, Any]

DEPLOYMENTS = ("gateway", "tokenizer", "prefill", "decode")
RAY_METRICS_PORT = 8080
AGENT_PORT = 52365
_HEAD_PORTS = {6379, 8265, RAY_METRICS_PORT, AGENT_PORT}
_PROXY_PORT = 8000


@dataclass(frozen=True)
class Finding:
    """A mistake: the rule that it breaks, the object that it is in, and what is wrong."""

    rule: str
    where: str
    problem: str

    def __str__(self) -> str:
        return f"[{self.rule}] {self.where}: {self.problem}"


@dataclass(frozen=True)
class Pod:
    """One kind of pod. name: its group's or its StatefulSet's. least, most: how many there may be."""

    name: str
    labels: Mapping[str, str]
    spec: Doc
    is_ray: bool
    least: int
    most: int

    @property
    def containers(self) -> list[Doc]:
        return list(self.spec.get("containers") or [])

    @property
    def main(self) -> Doc:
        """The first container: Ray's, or the store's."""
        return self.containers[0] if self.containers else {}

    @cached_property
    def named_ports(self) -> dict[str, int]:
        """Container ports by name; KubeRay adds the one of Ray's metrics."""
        ports = {"metrics": RAY_METRICS_PORT} if self.is_ray else {}
        for container in self.containers:
            ports |= {port["name"]: port["containerPort"] for port in container.get("ports") or [] if "name" in port}
        return ports

    def port(self, name_or_number: str | int) -> int | None:
        """The number behind a targetPort or a probe's port; None if no port has the name."""
        return name_or_number if isinstance(name_or_number, int) else self.named_ports.get(name_or_number)

    def volume_at(self, path: str) -> tuple[Doc, str] | None:
        """The volume that a file lies in, and the file's path inside of it; None if it lies on the image."""
        mounts = self.main.get("volumeMounts") or []
        fitting = [each for each in mounts if path == each["mountPath"] or path.startswith(each["mountPath"] + "/")]
        if not fitting:
            return None
        mount = max(fitting, key=lambda each: len(each["mountPath"]))
        found = [each for each in self.spec.get("volumes") or [] if each["name"] == mount["name"]]
        return (found[0], path.removeprefix(mount["mountPath"]).lstrip("/")) if found else None


class Cluster:
    """The documents of one overlay."""

    def __init__(self, name: str, docs: list[Doc]) -> None:
        self.name = name
        self.docs = docs

    def kinds(self, *kinds: str) -> Iterator[Doc]:
        """The documents of these kinds."""
        return (doc for doc in self.docs if doc.get("kind") in kinds)

    def named(self, kind: str, name: str) -> Doc | None:
        """One document, or None."""
        return next((doc for doc in self.kinds(kind) if doc["metadata"]["name"] == name), None)

    @cached_property
    def service(self) -> Doc:
        """The spec of the one RayService."""
        (found,) = self.kinds("RayService")
        spec: Doc = found["spec"]
        return spec

    @property
    def ray(self) -> Doc:
        """The spec of its RayCluster."""
        cluster: Doc = self.service["rayClusterConfig"]
        return cluster

    @property
    def groups(self) -> list[Doc]:
        """Worker groups."""
        return list(self.ray.get("workerGroupSpecs") or [])

    @cached_property
    def serve_config(self) -> Doc:
        """serveConfigV2, parsed; empty if it is no mapping."""
        document = yaml.safe_load(self.service.get("serveConfigV2") or "")
        return document if isinstance(document, dict) else {}

    @cached_property
    def args(self) -> Doc:
        """The application's settings as the Serve config has them."""
        applications = self.serve_config.get("applications") or [{}]
        return dict(applications[0].get("args") or {})

    @cached_property
    def environment(self) -> dict[str, str]:
        """The variables of the head, where Serve reads the settings: envFrom, then env."""
        container = self.ray["headGroupSpec"]["template"]["spec"]["containers"][0]
        variables: dict[str, str] = {}
        for source in container.get("envFrom") or []:
            config = self.named("ConfigMap", (source.get("configMapRef") or {}).get("name", ""))
            variables |= {} if config is None else config.get("data") or {}
        return variables | {each["name"]: each["value"] for each in container.get("env") or [] if "value" in each}

    @cached_property
    def settings(self) -> Settings | None:
        """The settings in force; None if they are not valid (which is a finding of its own)."""
        try:
            return Settings.from_mapping(self.args, self.environment)
        except AntiphonError:
            return None

    @cached_property
    def pods(self) -> list[Pod]:
        """Every kind of pod that will run."""
        found = [_ray_pod(self.ray["headGroupSpec"], "headgroup", "head")]
        found += [_ray_pod(group, group["groupName"], "worker") for group in self.groups]
        return found + [_set_pod(doc) for doc in self.kinds("StatefulSet", "Deployment")]

    @property
    def ray_pods(self) -> list[Pod]:
        return [pod for pod in self.pods if pod.is_ray]

    def group_of(self, deployment: str) -> Doc | None:
        """The one group whose machines offer what a deployment's replicas ask for; None if none or several do."""
        wanted = getattr(self.settings, deployment).resources if self.settings else {}
        offering = [group for group in self.groups if _covers(group.get("resources") or {}, wanted)]
        return offering[0] if wanted and len(offering) == 1 else None

    def pod_of(self, deployment: str) -> Pod | None:
        """The pod that a deployment's replicas run in."""
        group = self.group_of(deployment)
        return next((pod for pod in self.pods if group and pod.is_ray and pod.name == group["groupName"]), None)

    def listening(self, pod: Pod) -> set[int]:
        """Ports on which a process of the pod accepts connections, by what the settings say."""
        if not pod.is_ray:
            return _redis_ports(self, pod)
        is_head = pod.name == "headgroup"
        ports = set(_HEAD_PORTS if is_head else {RAY_METRICS_PORT, AGENT_PORT})
        location = self.serve_config.get("proxy_location", "EveryNode")
        if location == "EveryNode" or (is_head and location == "HeadOnly"):
            ports.add(_PROXY_PORT)
        if self.settings is None:
            return ports
        telemetry = self.settings.telemetry
        if pod is self.pod_of("gateway"):
            ports |= {self.settings.gateway.port, telemetry.metrics_port}
        if pod in (self.pod_of("prefill"), self.pod_of("decode")):
            ports.add(telemetry.replica_metrics_port)
        return ports - {0}


def _ray_pod(group: Doc, name: str, node_type: str) -> Pod:
    template = group["template"]
    labels = {
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
        **((template.get("metadata") or {}).get("labels") or {}),
        **(group.get("labels") or {}),
        "ray.io/is-ray-node": "yes",
        "ray.io/node-type": node_type,
        "ray.io/group": name,
    }
    least = group.get("minReplicas", 0) if node_type == "worker" else 1
    return Pod(name, labels, template.get("spec") or {}, True, least, group.get("maxReplicas", 1))


def _set_pod(doc: Doc) -> Pod:
    template, replicas = doc["spec"]["template"], doc["spec"].get("replicas", 1)
    labels = (template.get("metadata") or {}).get("labels") or {}
    return Pod(doc["metadata"]["name"], labels, template.get("spec") or {}, False, replicas, replicas)


def _covers(offered: Mapping[str, str], wanted: Mapping[str, float]) -> bool:
    return bool(wanted) and all(float(offered.get(name, 0)) >= amount for name, amount in wanted.items())


def redis_config(cluster: Cluster, pod: Pod) -> dict[str, str]:
    """The directives of the file that a store's command names."""
    command = [*(pod.main.get("command") or []), *(pod.main.get("args") or [])]
    place = pod.volume_at(command[1]) if len(command) > 1 else None
    if place is None or "configMap" not in place[0]:
        return {}
    config = cluster.named("ConfigMap", place[0]["configMap"]["name"])
    text = "" if config is None else (config.get("data") or {}).get(place[1], "")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return {line[0]: " ".join(line[1:]) for line in lines if line}


def _redis_ports(cluster: Cluster, pod: Pod) -> set[int]:
    port = redis_config(cluster, pod).get("port")
    return {int(port)} if port else set()


def matches(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """A Kubernetes label selector: matchLabels and matchExpressions. None selects nothing, an empty one everything."""
    if selector is None:
        return False
    wanted = selector.get("matchLabels") or {}
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    return all(_holds(each, labels) for each in selector.get("matchExpressions") or [])


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    key, values = expression["key"], expression.get("values") or []
    return {
        "In": labels.get(key) in values,
        "NotIn": labels.get(key) not in values,
        "Exists": key in labels,
        "DoesNotExist": key not in labels,
    }[expression["operator"]]
