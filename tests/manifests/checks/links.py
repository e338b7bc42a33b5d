"""What names something else: selectors, ports by name, ConfigMaps, Secrets, volumes, the two stores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from tests.manifests.model import Cluster, Doc, Finding, Pod, matches, redis_config

# Made in the cluster: by scripts/cluster_secrets.py, by cert-manager, or by whoever brings the weights.
EXTERNAL = {
    ("Secret", "antiphon-ray"): {"auth_token"},
    ("Secret", "antiphon-sessions"): {"key"},
    ("Secret", "antiphon-tenants"): {"tokens.yaml"},
    ("Secret", "sessions-redis"): {"password", "users.acl"},
    ("Secret", "gcs-redis"): {"password", "users.acl"},
    ("PersistentVolumeClaim", "antiphon-models"): set(),
    ("ConfigMap", "kube-root-ca.crt"): {"ca.crt"},
}
_CERTIFICATE_KEYS = {"tls.crt", "tls.key", "ca.crt"}


def services(cluster: Cluster) -> Iterator[Finding]:
    """service: selects pods of one kind, leads to a port of theirs, says what is spoken."""
    for doc in cluster.kinds("Service"):
        where, spec = f"Service/{doc['metadata']['name']}", doc["spec"]
        selected = [pod for pod in cluster.pods if matches({"matchLabels": spec.get("selector")}, pod.labels)]
        if len(selected) != 1 or not spec.get("selector"):
            yield Finding("service", where, f"selects {[pod.name for pod in selected]}: one kind of pod is needed")
            continue
        for port in spec["ports"]:
            number = selected[0].port(port.get("targetPort", port["port"]))
            if number not in cluster.listening(selected[0]):
                yield Finding("service", where, f"{port.get('targetPort')} is no port of {selected[0].name}")
    yield from _gateway(cluster)


def _gateway(cluster: Cluster) -> Iterator[Finding]:
    settings, doc = cluster.settings, cluster.named("Service", "antiphon")
    if doc is None or settings is None:
        yield Finding("service", "Service/antiphon", "clients need one address")
        return
    (port, *_) = doc["spec"]["ports"]
    spoken = "https" if settings.gateway.tls else "kubernetes.io/h2c"
    if port.get("appProtocol") != spoken or port["port"] != settings.gateway.port:
        yield Finding("service", "Service/antiphon", f"appProtocol {spoken} on port {settings.gateway.port} is needed")


def budgets(cluster: Cluster) -> Iterator[Finding]:
    """budget: protects pods that there are, and lets a machine be drained all the same."""
    for doc in cluster.kinds("PodDisruptionBudget"):
        where, spec = f"PodDisruptionBudget/{doc['metadata']['name']}", doc["spec"]
        selected = [pod for pod in cluster.pods if matches(spec.get("selector"), pod.labels)]
        if not selected:
            yield Finding("budget", where, "selects no pod")
        for pod in selected:
            if pod.is_ray and ("maxUnavailable" in spec or not isinstance(spec.get("minAvailable"), int)):
                yield Finding("budget", where, "Ray's pods have no scale: only a number of minAvailable counts")
            elif spec.get("minAvailable", 0) >= pod.least:
                yield Finding("budget", where, f"{pod.name} may have {pod.least} pods: a drain would never end")


def monitors(cluster: Cluster) -> Iterator[Finding]:
    """monitor: scrapes pods that there are, at ports that serve metrics; and all that do are scraped."""
    scraped: set[tuple[str, int]] = set()
    for doc in cluster.kinds("PodMonitor"):
        where, spec = f"PodMonitor/{doc['metadata']['name']}", doc["spec"]
        selected = [pod for pod in cluster.pods if matches(spec["selector"], pod.labels)]
        if not selected:
            yield Finding("monitor", where, "selects no pod")
        for pod in selected:
            for endpoint in spec["podMetricsEndpoints"]:
                number = pod.named_ports.get(endpoint["port"])
                if number is None or number not in cluster.listening(pod):
                    yield Finding("monitor", where, f"{endpoint['port']} is no port of {pod.name}")
                else:
                    scraped.add((pod.name, number))
    if scraped and cluster.settings is not None:
        port = cluster.settings.telemetry.metrics_port
        for name in ("gateway", "prefill", "decode"):
            if (name, port) not in scraped:
                yield Finding("monitor", "PodMonitor/antiphon", f"nobody scrapes {name}")


def references(cluster: Cluster) -> Iterator[Finding]:
    """reference: what is named exists here, or is known to be made in the cluster."""
    for where, kind, name, keys in _references(cluster):
        doc = cluster.named(kind, name)
        issued = kind == "Secret" and any(each["spec"]["secretName"] == name for each in cluster.kinds("Certificate"))
        if doc is not None:
            known = set(doc.get("data") or {}) if kind == "ConfigMap" else set()
        elif issued:
            known = _CERTIFICATE_KEYS
        elif (kind, name) in EXTERNAL:
            known = EXTERNAL[kind, name]
        else:
            yield Finding("reference", where, f"{kind}/{name} does not exist")
            continue
        if keys - known:
            yield Finding("reference", where, f"{kind}/{name} has no {sorted(keys - known)}")


def _references(cluster: Cluster) -> Iterator[tuple[str, str, str, set[str]]]:
    for pod in cluster.pods:
        for container in pod.containers:
            yield from _variables(pod.name, container)
        for volume in pod.spec.get("volumes") or []:
            yield from _volume(pod.name, volume)
    yield from _variables("autoscaler", cluster.ray.get("autoscalerOptions") or {})
    options = cluster.ray.get("gcsFaultToleranceOptions") or {}
    for value in (options.get("redisPassword") or {}, options.get("redisUsername") or {}):
        yield from _variables("gcsFaultToleranceOptions", {"env": [value]})
    name = (cluster.ray.get("authOptions") or {}).get("secretName")
    if name:
        yield "authOptions", "Secret", name, {"auth_token"}


def _variables(where: str, container: Doc) -> Iterator[tuple[str, str, str, set[str]]]:
    for source in container.get("envFrom") or []:
        for kind, key in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
            if key in source:
                yield where, kind, source[key]["name"], set()
    for variable in container.get("env") or []:
        source = variable.get("valueFrom") or {}
        for kind, key in (("ConfigMap", "configMapKeyRef"), ("Secret", "secretKeyRef")):
            if key in source:
                yield where, kind, source[key]["name"], {source[key]["key"]}


def _volume(where: str, volume: Doc) -> Iterator[tuple[str, str, str, set[str]]]:
    for source in (volume.get("projected") or {}).get("sources") or [volume]:
        for kind, key, name in (("Secret", "secret", "secretName"), ("ConfigMap", "configMap", "name")):
            if key in source:
                named = source[key].get(name) or source[key]["name"]
                yield where, kind, named, {item["key"] for item in source[key].get("items") or []}
    if "persistentVolumeClaim" in volume:
        yield where, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], set()


def stores(cluster: Cluster) -> Iterator[Finding]:
    """store: sessions and Ray's state in two servers, both on disk, none without users."""
    urls = {"gcsFaultToleranceOptions": (cluster.ray.get("gcsFaultToleranceOptions") or {}).get("redisAddress", "")}
    if cluster.settings is not None:
        urls["sessions.url"] = cluster.settings.sessions.url or ""
    targets: dict[str, str] = {}
    for where, url in urls.items():
        parts = urlsplit(url)
        service = cluster.named("Service", (parts.hostname or "").partition(".")[0])
        if service is None or parts.port not in [port["port"] for port in service["spec"]["ports"]]:
            yield Finding("store", where, f"no Service at {url!r}")
        else:
            targets[where] = service["metadata"]["name"]
    if len(set(targets.values())) < len(targets):
        yield Finding("store", "sessions.url", "is Ray's own store: if that stops, so does Ray's head")
    for pod in cluster.pods:
        if not pod.is_ray:
            yield from _kept(cluster, pod)


def _kept(cluster: Cluster, pod: Pod) -> Iterator[Finding]:
    config = redis_config(cluster, pod)
    if config.get("appendonly") != "yes" or config.get("maxmemory-policy") != "noeviction":
        yield Finding("store", pod.name, "appendonly yes and maxmemory-policy noeviction are needed")
    if pod.volume_at(config.get("aclfile", "")) is None:
        yield Finding("store", pod.name, "an aclfile from a Secret is needed")
    doc = cluster.named("StatefulSet", pod.name)
    claims = [each["metadata"]["name"] for each in (doc or {}).get("spec", {}).get("volumeClaimTemplates") or []]
    mounts: list[Any] = pod.main.get("volumeMounts") or []
    if not any(each["mountPath"] == config.get("dir") and each["name"] in claims for each in mounts):
        yield Finding("store", pod.name, "its data is not on a volume that outlives the pod")


CHECKS = (services, budgets, monitors, references, stores)
