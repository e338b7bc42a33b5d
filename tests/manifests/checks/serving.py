"""What is deployed: the Serve config, our settings in it, and a place for every replica."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

# isort: split
import tests.cluster.ray_session  # noqa: F401  (sets variables that Ray reads when it is imported)

# isort: split
import pydantic
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    LoggingConfig,
    ServeApplicationSchema,
    ServeDeploySchema,
    gRPCOptionsSchema,
)

from services.common.errors import AntiphonError
from services.common.settings import Settings
from tests.manifests.model import DEPLOYMENTS, Cluster, Doc, Finding, Pod

_LOOPBACK = re.compile(r"^(localhost|127\.|::1)")
_GPU = "nvidia.com/gpu"
_NESTED: dict[str, type[pydantic.BaseModel]] = {
    "applications": ServeApplicationSchema,
    "deployments": DeploymentSchema,
    "http_options": HTTPOptionsSchema,
    "grpc_options": gRPCOptionsSchema,
    "logging_config": LoggingConfig,
}


def serve_config(cluster: Cluster) -> Iterator[Finding]:
    """serve-config: Ray's own schema. import-path: it leads to a function. settings: ours accept the arguments."""
    try:
        ServeDeploySchema.model_validate(cluster.serve_config)
    except pydantic.ValidationError as error:
        yield Finding("serve-config", "serveConfigV2", str(error).replace("\n", " ")[:300])
        return
    for path in _unknown(cluster.serve_config, ServeDeploySchema, ""):
        yield Finding("serve-config", "serveConfigV2", f"{path}: Serve knows no such field")
    for application in cluster.serve_config["applications"]:
        try:
            build = _imported(application["import_path"])
        except (ImportError, AttributeError, ValueError) as error:
            yield Finding("import-path", application["import_path"], str(error))
            continue
        try:
            build_with(build, Settings.from_mapping(cluster.args, cluster.environment))
        except AntiphonError as error:
            yield Finding("settings", "serveConfigV2 and the settings' ConfigMap", str(error))


def scaling(cluster: Cluster) -> Iterator[Finding]:
    """scaling: our policy decides where the settings say so, and reads the settings that the replicas have."""
    application = (cluster.serve_config.get("applications") or [{}])[0]
    policy = application.get("autoscaling_policy") or {}
    is_wanted = cluster.settings is not None and cluster.settings.autoscaling.enabled
    if not is_wanted:
        if policy:
            yield Finding("scaling", "serveConfigV2", "a policy is given that autoscaling.enabled does not want")
        return
    try:
        _imported(policy.get("policy_function", ""))
    except (ImportError, AttributeError, ValueError) as error:
        yield Finding("scaling", "serveConfigV2", f"autoscaling_policy: {error}")
    if (policy.get("policy_kwargs") or {}).get("settings") != application.get("args"):
        yield Finding("scaling", "serveConfigV2", "the policy has other settings than the replicas")


def _unknown(document: Doc, model: type[pydantic.BaseModel], path: str) -> Iterator[str]:
    """Serve's schema drops what it does not know."""
    for key, value in document.items():
        if key not in model.model_fields:
            yield path + key
        elif key in _NESTED:
            for each in value if isinstance(value, list) else [value]:
                yield from _unknown(each, _NESTED[key], f"{path}{key}.")


def build_with(build: Any, settings: Settings) -> None:
    """The application's graph, as the head builds it from settings in force."""
    build(settings.model_dump(mode="json"))


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    found = getattr(importlib.import_module(module), name)
    if not callable(found):
        raise ValueError("is no function")
    return found


def placement(cluster: Cluster) -> Iterator[Finding]:
    """placement: one group of pods for each deployment, large enough, with the bounds that the settings say."""
    settings = cluster.settings
    if settings is None:
        return
    for name in DEPLOYMENTS:
        section, group = getattr(settings, name), cluster.group_of(name)
        if group is None:
            yield Finding("placement", name, f"no group, or several, offers {section.resources or 'its resource'}")
            continue
        where = f"group {group['groupName']}"
        if group["groupName"] != name:
            yield Finding("placement", where, f"offers the resources of {name}")
        bounds = getattr(settings.autoscaling, name)
        if (group.get("minReplicas"), group.get("maxReplicas")) != (bounds.min, bounds.max):
            yield Finding("placement", where, f"bounds differ from autoscaling.{name}: {bounds.min} to {bounds.max}")
        if not bounds.min <= section.num_replicas <= bounds.max or group.get("replicas") != section.num_replicas:
            yield Finding("placement", where, f"{name}.num_replicas is {section.num_replicas}")
    for name in ("prefill", "decode"):
        pod = cluster.pod_of(name)
        if pod is not None:
            yield from _fits(name, getattr(settings, name), pod, settings.engine.device)


def _fits(name: str, section: Any, pod: Pod, device: str) -> Iterator[Finding]:
    resources = pod.main.get("resources") or {}
    gpus = int((resources.get("limits") or {}).get(_GPU, 0))
    if section.num_gpus != gpus or (device == "cuda") != (gpus > 0):
        yield Finding("placement", f"group {name}", f"{section.num_gpus} GPUs on {device} wanted, {gpus} there")
    if section.num_cpus > max(1.0, cpus((resources.get("requests") or {}).get("cpu", "0"))):
        yield Finding("placement", f"group {name}", f"{section.num_cpus} CPUs wanted")
    if (device == "cuda") != str(pod.main.get("image", "")).endswith("-gpu"):
        yield Finding("placement", f"group {name}", f"image {pod.main.get('image')} is not for {device}")


def cpus(quantity: str) -> float:
    """A Kubernetes quantity of CPU."""
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def idle_head(cluster: Cluster) -> Iterator[Finding]:
    """head: no replica may run beside Ray's own processes, and Serve traffic never goes there."""
    if cluster.ray["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
        yield Finding("head", "headGroupSpec", 'rayStartParams num-cpus must be "0"')
    if not cluster.service.get("excludeHeadPodFromServeSvc"):
        yield Finding("head", "RayService", "excludeHeadPodFromServeSvc must be set")


def reach(cluster: Cluster) -> Iterator[Finding]:
    """reach: what other pods ask must not listen on loopback."""
    if cluster.settings is None:
        return
    settings = cluster.settings
    hosts = {"gateway.host": settings.gateway.host, "telemetry.metrics_host": settings.telemetry.metrics_host}
    for key, host in hosts.items():
        if _LOOPBACK.match(host):
            yield Finding("reach", key, f"{host} can only be reached from inside the pod")
    if settings.decode.host != "node":
        yield Finding("reach", "decode.host", "must be node: gateways get the address that decode registers")
    for key in ("metrics_port", "replica_metrics_port"):
        if getattr(settings.telemetry, key) == 0:
            yield Finding("reach", f"telemetry.{key}", "a scraper has to know the port")


def files(cluster: Cluster) -> Iterator[Finding]:
    """files: every file that the settings name is mounted where it is read."""
    settings = cluster.settings
    if settings is None:
        return
    store = [settings.sessions.password_file, settings.sessions.secret_file, settings.sessions.tls_ca_file]
    tls = settings.gateway.tls
    edge = [settings.gateway.auth_tokens_file, *(tls.model_dump().values() if tls is not None else ())]
    head = store if settings.autoscaling.enabled else []  # the policy runs there
    readers = {"head": head, "gateway": store + edge, "prefill": store, "decode": store, "tokenizer": []}
    for name, paths in readers.items():
        pod = cluster.pods[0] if name == "head" else cluster.pod_of(name)
        model = [] if settings.model.path == "demo" or name == "head" else [settings.model.path]
        for path in [*paths, *model] if pod is not None else []:
            if path is not None and not _is_mounted(pod, str(path)):
                yield Finding("files", name, f"{path} is not in a volume of the pod")
    if settings.gateway.auth_tokens_file is None:
        yield Finding("files", "gateway.auth_tokens_file", "the gateway is open to everybody without one")


def _is_mounted(pod: Pod | None, path: str) -> bool:
    place = None if pod is None else pod.volume_at(path)
    if place is None:
        return False
    volume, inside = place
    if "projected" in volume:
        secrets = [each["secret"] for each in volume["projected"]["sources"] if "secret" in each]
        return any(item["path"] == inside for secret in secrets for item in secret.get("items") or [])
    if "secret" in volume:
        items = volume["secret"].get("items")
        return items is None or any(item["path"] == inside for item in items)
    return "persistentVolumeClaim" in volume


def authentication(cluster: Cluster) -> Iterator[Finding]:
    """auth: Ray's ports want a token, from a Secret that outlives the cluster."""
    options: Doc = cluster.ray.get("authOptions") or {}
    if options.get("mode") != "token" or not options.get("secretName"):
        yield Finding("auth", "authOptions", "mode token with a secretName is needed")


CHECKS = (serve_config, scaling, placement, idle_head, reach, files, authentication)
